"""The study's plots: frontiers with bands, both scores over the learning rate, forgetting against interference."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nslora_dist.plots import COLORS, MARKERS, STYLE
from nslora_dist.study.analysis import arms_of, of_calibration, of_first_calibration, of_methods, plot_of, whole_arms
from nslora_dist.study.points import forgetting, grouped, relative_retention
from nslora_dist.study.prediction import exercising
from nslora_dist.study.settings import Line, over_same_seeds, planned_settings, setting_of
from nslora_dist.study.spec import Study
from nslora_dist.study.statistics import frontier

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FINE = np.linspace(0.0, 1.0, 401)
LOWEST = 1e-4
"""Interference below it is drawn at it: the axis is logarithmic, and this is what float32 can tell apart."""
ACROSS = 3
"""Panels of the headline's plot beside each other."""


def draw_study(folder: Path, lines: Sequence[Line], study: Study, found: Mapping[str, Any]) -> list[Path]:
    """Draws every plot that the lines, and what was ``found`` in them, have data for; gives the files, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    present = {line["arm"] for line in lines}
    compared = [arm for arm in found["compared"] if arm in present]  # each has a colour of its own
    others = [arm for arm in study.arms if arm in present and arm not in compared]
    looks = {arm: number for number, arm in enumerate([*compared, *others])}
    drawn = []
    methods = of_methods(lines, study)
    shown = of_first_calibration(found["settings"])
    planned = planned_settings(study)
    whole: dict[tuple[str, str], dict[str, list[Line]]] = {}
    for setting in shown:
        own = [line for line in methods if (line["size"], line["task"]) == (setting["size"], setting["task"])]
        arms = arms_of(own, setting["calibration"], planned)
        if chosen_arms := {name: arms[name] for name in whole_arms(setting, found["compared"])}:
            whole[setting["size"], setting["task"]] = chosen_arms
    if whole:
        drawn.append(folder / "headline.png")
        _save(
            drawn[-1],
            partial(_headline, looks=looks, whole=whole),
            width=12.0,
            height=4.2 * math.ceil(len(whole) / ACROSS) + 0.6,
        )
    for (size, task), own in grouped(methods, lambda line: (line["size"], line["task"])).items():
        for calibration in dict.fromkeys(line["calibration"] for line in own):
            chosen = of_calibration(own, calibration)
            title = f"{size}, {task}, calibrated on {calibration}"
            name = f"{size}_{task}_{calibration}"
            for kind, draw in (("frontier", _frontiers), ("rates", _rates)):
                drawn.append(folder / f"{kind}_{name}.png")
                _save(drawn[-1], partial(draw, lines=chosen, looks=looks, title=title), width=11.0)
    for sweep in found["sweeps"]:
        drawn.append(folder / plot_of(sweep))
        _save(drawn[-1], partial(_sweep, sweep=sweep, looks=looks), width=8.0)
    for curve in found["curves"]:
        drawn.append(folder / plot_of(curve))
        _save(drawn[-1], partial(_curve, curve=curve), width=8.0)
    path = folder / "prediction.png"
    _save(path, partial(_prediction, lines=exercising(lines), looks=looks, kin=_kin(study, compared)), width=12.0)
    probes = folder / "probes.png"
    _save(probes, partial(_probes, lines=lines), width=8.0)
    return [*drawn, path, probes]


def _save(path: Path, draw: "Callable[[Figure], None]", *, width: float, height: float = 4.8) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # its stub wants every key as a literal
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(path)


def _kin(study: Study, compared: Sequence[str]) -> dict[str, str]:
    """Arm → the compared arm of its method, of which it has another rank or a budget; itself where there is none."""

    def method(arm: str) -> tuple[Any, ...]:
        own = study.arms[arm]
        return own.peer, own.section.method, own.section.form, own.section.a_is_frozen

    of_method = {method(arm): arm for arm in reversed(compared)}
    return {arm: arm if arm in compared else of_method.get(method(arm), arm) for arm in study.arms}


def _look(number: int) -> dict[str, Any]:
    # Colours run out before arms do: then the marker, and the line, tell them apart.
    turn = number // len(COLORS)
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[(number + 3 * turn) % len(MARKERS)],
        "linestyle": ("-", "--", ":")[turn % 3],
        "zorder": 4.0 - number / 100,  # the first lie on top
    }


def _panels(figure: "Figure", lines: Sequence[Line]) -> "dict[float, Axes]":
    decays = sorted({float(line["weight_decay"]) for line in lines})
    axes = figure.subplots(1, len(decays), sharey=True, squeeze=False)[0]
    return dict(zip(decays, axes, strict=True))


def most_kept(adaptation: Sequence[float], retention: Sequence[float], start: float) -> np.ndarray:
    """At each of ``FINE``: the most retention to be had at so much adaptation; NaN where none is."""
    points = frontier([start, *adaptation], [1.0, *retention])
    found = np.full(len(FINE), np.nan)
    for a, r in points:  # by falling adaptation, rising retention: later ones overwrite what they cover
        found[a + 1e-9 >= FINE] = r
    return found


def _headline(
    figure: "Figure", looks: Mapping[str, int], whole: Mapping[tuple[str, str], Mapping[str, list[Line]]]
) -> None:
    """Every arm's frontier over all its settings with the first calibration, if run: one panel a base and task."""
    across = min(ACROSS, len(whole))
    panels = figure.subplots(math.ceil(len(whole) / across), across, sharey=True, squeeze=False)
    for axes in panels.flat[len(whole) :]:
        axes.set_visible(False)
    for axes, ((size, task), arms) in zip(panels.flat, whole.items(), strict=False):
        for arm, here in arms.items():
            start = float(here[0]["base"]["adaptation"])
            _frontier(axes, here, start=start, look=_look(looks[arm]), label=arm)
        axes.set(xlabel="adaptation (task accuracy)", title=f"{size}, {task.replace('_', ' ')}", xlim=(-0.02, 1.02))
    for axes in panels[:, 0]:
        axes.set(ylabel="retention, of the base's", ylim=(0.38, 1.02))
    _legend(figure)


def _frontier(axes: "Axes", lines: Sequence[Line], *, start: float, look: Mapping[str, Any], label: str) -> None:
    """Of one arm: its settings' means, the frontier of these, and the range of the seeds' own frontiers."""
    by_seed = [
        most_kept([float(x["adaptation"]) for x in own], [relative_retention(x) for x in own], start)
        for own in grouped(lines, lambda line: line["seed"]).values()
    ]
    curves = np.nan_to_num(np.array(by_seed), nan=0.0)
    if len(curves) > 1:
        axes.fill_between(FINE, curves.min(0), curves.max(0), color=look["color"], alpha=0.12, linewidth=0)
    settings = grouped(lines, setting_of).values()
    a = [float(np.mean([x["adaptation"] for x in own])) for own in settings]
    r = [float(np.mean([relative_retention(x) for x in own])) for own in settings]
    axes.plot(a, r, **{**look, "linestyle": "none"}, markersize=5, label=label)
    axes.plot(FINE, most_kept(a, r, start), **{**look, "marker": ""}, linewidth=1.3)


def _frontiers(figure: "Figure", lines: Sequence[Line], looks: Mapping[str, int], title: str) -> None:
    for decay, axes in _panels(figure, lines).items():
        here = [line for line in lines if float(line["weight_decay"]) == decay]
        start = float(here[0]["base"]["adaptation"])
        for arm, own in sorted(grouped(here, lambda line: line["arm"]).items()):
            _frontier(axes, over_same_seeds(own), start=start, look=_look(looks[arm]), label=arm)
        axes.set(title=f"weight decay {decay:g}", xlim=(-0.02, 1.02))
    figure.supxlabel("adaptation (task accuracy)", fontsize=10)
    figure.axes[0].set(ylabel="retention, of the base's", ylim=(-0.02, 1.04))
    _legend(figure)
    figure.suptitle(title)


def _rates(figure: "Figure", lines: Sequence[Line], looks: Mapping[str, int], title: str) -> None:
    for decay, axes in _panels(figure, lines).items():
        here = [line for line in lines if float(line["weight_decay"]) == decay]
        for arm, own in sorted(grouped(here, lambda line: line["arm"]).items()):
            rates = dict(sorted(grouped(own, lambda line: float(line["learning_rate"])).items()))
            look = _look(looks[arm])
            for value, style in ((_task, ":"), (relative_retention, "-")):
                found = [[value(x) for x in of] for of in rates.values()]
                mean = [float(np.mean(of)) for of in found]
                label = arm if style == "-" else None
                axes.plot(list(rates), mean, linestyle=style, color=look["color"], marker=look["marker"], markersize=4)
                axes.plot([], [], linestyle="-", color=look["color"], marker=look["marker"], label=label)
                low, high = [min(of) for of in found], [max(of) for of in found]
                axes.fill_between(list(rates), low, high, color=look["color"], alpha=0.1, linewidth=0)
        axes.set(xscale="log", title=f"weight decay {decay:g}")
    figure.supxlabel("learning rate", fontsize=10)
    figure.axes[0].set(ylabel="retention (solid), adaptation (dotted)", ylim=(-0.02, 1.04))
    _legend(figure)
    figure.suptitle(title)


def _task(line: Line) -> float:
    return float(line["adaptation"])


def _sweep(figure: "Figure", sweep: Mapping[str, Any], looks: Mapping[str, int]) -> None:
    """The area under every arm's frontier along weight decay, with its interval over seeds."""
    axes = figure.subplots()
    variants = list(sweep["variants"].values())
    decays = sorted({own["weight_decay"] for own in variants})
    for arm, here in grouped(variants, lambda own: own["arm"]).items():
        at, look = [decays.index(own["weight_decay"]) for own in here], _look(looks[arm])
        area = [own["area"] for own in here]
        axes.plot(at, [a["value"] for a in area], **look, markersize=4, label=arm)
        low, high = ([a[end] if a[end] is not None else a["value"] for a in area] for end in ("low", "high"))
        axes.fill_between(at, low, high, color=look["color"], alpha=0.12, linewidth=0)
    axes.set_xticks(range(len(decays)), [f"{decay:g}" for decay in decays])
    axes.set(xlabel="weight decay", ylabel="area under the frontier")
    axes.set_title(f"{sweep['grid']}: {sweep['size']}, {sweep['task']}")
    _legend(figure)


def _curve(figure: "Figure", curve: Mapping[str, Any]) -> None:
    """Both scores along what a grid varies, a line a learning rate."""
    axes = figure.subplots()
    values = list(dict.fromkeys(point["value"] for point in curve["points"]))
    names = ["none" if value is None else str(value) for value in values]
    for number, (rate, own) in enumerate(sorted(grouped(curve["points"], lambda p: p["learning_rate"]).items())):
        at = [values.index(point["value"]) for point in own]
        look = _look(number)
        for score, style in (("retention", "-"), ("adaptation", ":")):
            mean = np.array([point[score] for point in own])
            spread = np.array([point[f"{score}_spread"] or 0.0 for point in own])
            label = f"learning rate {rate:g}" if score == "retention" else None
            axes.plot(at, mean, linestyle=style, color=look["color"], marker=look["marker"], markersize=4, label=label)
            axes.fill_between(at, mean - spread, mean + spread, color=look["color"], alpha=0.12, linewidth=0)
    axes.set_xticks(range(len(values)), names)
    axes.set(xlabel=curve["along"], ylabel="retention (solid), adaptation (dotted)", ylim=(-0.02, 1.04))
    axes.set_title(f"{curve['grid']}: {curve['size']}, {curve['task']}")
    _legend(figure)


def _prediction(figure: "Figure", lines: Sequence[Line], looks: Mapping[str, int], kin: Mapping[str, str]) -> None:
    """The cells of ``predict``'s first table; other ranks and budgets of a method look as the method does."""
    panels = figure.subplots(1, 2, sharey=True)
    kinds = {"rms": "interference, rms over modules", "kl": "divergence of the output, nats a token"}
    for axes, (kind, label) in zip(panels, kinds.items(), strict=True):
        for arm, own in sorted(grouped(lines, lambda line: kin[line["arm"]]).items()):
            x = [max(LOWEST, float(line["interference"]["calibration"][kind])) for line in own]
            look = _look(looks[arm]) | {"linestyle": "none"}
            axes.plot(x, [forgetting(line) for line in own], **look, markersize=4, alpha=0.7, label=arm)
        axes.set(xscale="log", xlabel=f"{label}, on the calibration texts")
    panels[0].set(ylabel="forgetting")
    figure.suptitle("Forgetting, and what was measured before any evaluation")
    _legend(figure)


def _probes(figure: "Figure", lines: Sequence[Line]) -> None:
    axes = figure.subplots()
    for number, piece in enumerate(lines[0]["interference"]["probes"]):
        x = [max(LOWEST, float(line["interference"]["probes"][piece]["rms"])) for line in lines]
        look = _look(number) | {"linestyle": "none"}
        axes.plot(x, [forgetting(line, piece) for line in lines], **look, markersize=4, alpha=0.7, label=piece)
    axes.set(xscale="log", xlabel="interference on the probe (rms over modules)", ylabel="forgetting of that piece")
    axes.set_title("Probe by probe")
    _legend(figure)


def _legend(figure: "Figure") -> None:
    labelled: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    figure.legend(handles=list(labelled.values()), labels=list(labelled), loc="outside right upper", fontsize=8)
