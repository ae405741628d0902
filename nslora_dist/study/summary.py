"""``summary.md`` and ``summary.json``: every figure is computed from ``cells.jsonl``, and from nothing else."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nslora_dist import artifacts
from nslora_dist.card import markdown_table
from nslora_dist.study.analysis import COSTS, KEEPS, SHARES, analyse, of_first_calibration, plot_of, whole_arms
from nslora_dist.study.coverage import coverage_table
from nslora_dist.study.elsewhere import LEFT_OUT
from nslora_dist.study.lines import round_floats
from nslora_dist.study.plots import draw_study
from nslora_dist.study.prediction import predict
from nslora_dist.study.prediction_text import prediction_text
from nslora_dist.study.settings import Line
from nslora_dist.study.spec import Study
from nslora_dist.study.written import NONE, interval, score

OURS = ("lora_null", "null_lora")


def summarise(folder: Path, lines: Sequence[Line], study: Study, *, missing: int = 0, draws: int = 1000) -> Path:
    """Analyses, draws and writes.

    Args:
        folder: gets ``summary.json``, ``summary.md`` and ``plots/``.
        lines: of the study's cells, with their ``grids``.
        study: whose they are.
        missing: cells that have no line yet, which the summary says.
        draws: bootstrap resamples.

    Returns:
        The Markdown file.
    """
    found = round_floats(analyse(lines, study) | {"prediction": predict(lines, study, draws=draws)})
    artifacts.write_json(folder / "summary.json", found)
    plots = [path.relative_to(folder) for path in draw_study(folder / "plots", lines, study, found)]
    path = folder / "summary.md"
    artifacts.write_text(path, text_of(found, name=study.name, missing=missing, plots=plots))
    return path


def text_of(found: Mapping[str, Any], *, name: str, missing: int, plots: Sequence[Path]) -> str:
    """The Markdown of ``analyse``'s figures."""
    parts = [f"# Study {name}: {found['cells']} cells"]
    if missing:
        parts.append(f"**Unfinished: {missing} cells are missing.**")
    if found["settings"]:
        own = found["settings"], found["compared"]
        parts += [*_headlines(*own), FRESH, *_fresh(*own)]
        parts += [ELSEWHERE, _elsewhere(found)] if found["elsewhere"] else []
    parts += [f"![{path.stem}]({path})" for path in plots if path.stem == "headline"]
    parts.append(HOW)
    for setting in found["settings"]:
        title = f"{setting['size']}, {setting['task']}, calibrated on {setting['calibration']}"
        parts += [f"## {title}", _base(setting), _arms_table(setting), _pieces_table(setting)]
        key = f"{setting['size']}_{setting['task']}_{setting['calibration']}.png"
        parts += [f"![{title}]({path})" for path in plots if path.name in (f"frontier_{key}", f"rates_{key}")]
        parts += ["Each weight decay by itself:", _variants_table(_by_area(setting["variants"]))]
    for sweep in found["sweeps"]:
        parts += _sweep(sweep, plots)
    for curve in found["curves"]:
        parts += _curve(curve, plots)
    parts += prediction_text(found["prediction"])
    parts += [f"![{path.stem}]({path})" for path in plots if path.stem in ("prediction", "probes")]
    parts += ["## What was run", RUN, coverage_table(found["run"])]
    return "\n\n".join(parts) + "\n"


HOW = (
    "Retention is the mean over pieces of knowledge, over the base's own. *Area*: under the frontier, the most "
    "retention to be had at an adaptation of at least t, t from 0 to 1. *At 95%, 99%*: the most retention of a setting "
    "that reaches that share of the best adaptation that any arm of the first table has on this task; – where none "
    "does. A setting is a "
    "learning rate and a weight decay; an arm's are compared over the same seeds. In brackets: 95% intervals over "
    "seeds (Student's, by the jackknife, the setting chosen anew), none with one seed; (67%): of the seeds that may be "
    "left out, how many leave a setting that reaches the target. *lr*, *wd*: of the setting chosen for 95%, and at it "
    "*spread*, the sample's standard deviation over seeds of adaptation / retention, and *interference*, the root mean "
    "square over modules on the calibration texts. *Band*: decades of learning rate in which at least 95% of the best "
    f"adaptation is reached and {KEEPS:.0%} of the knowledge kept; ≥ where it goes on at the end of the rates that "
    "were run. *s*, *cpu s*: of a cell, by the clock and of the processor: training, evaluation and what is measured, "
    "without what it starts from (calibration, null spaces, PiSSA's and CorDA's decompositions, EVA's pass), which "
    "cells share. In the plots a dot is a setting, the mean over seeds; a line is the frontier of these; the shade is "
    "the range of the seeds' own frontiers, which is no confidence interval. Methods of this repository are set in "
    "bold; rows are in the order of their area."
)


RUN = (
    "Cells by grid, one number a seed: 135 × 3 are 135 cells with each of three seeds, 15 + 15 + 0 of 15 × 3 lack one "
    "seed. A cell that several grids share counts in each."
)


def _headlines(settings: Sequence[Mapping[str, Any]], compared: Collection[str]) -> list[str]:
    """A table a size: every compared arm in one row, on every task with the first calibration."""
    return [_headline(size, shown, compared) for size, shown in _by_size(settings)]


def _by_size(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    shown = of_first_calibration(settings)
    sizes = dict.fromkeys(setting["size"] for setting in shown)
    return [(size, [setting for setting in shown if setting["size"] == size]) for size in sizes]


def _headline(size: str, shown: Sequence[Mapping[str, Any]], compared: Collection[str]) -> str:
    whole = [whole_arms(setting, compared) for setting in shown]
    every = {name: own for setting in shown for name, own in setting["arms"].items() if name in compared}

    def cells(name: str, arms: Mapping[str, Any]) -> list[str]:
        if name not in arms:
            return [NONE, NONE]
        return [interval(arms[name]["area"]), interval(arms[name]["retention_at"][f"{SHARES[0]:g}"])]

    # By the mean area over what all were run on: one that was run on an easy task alone would lead otherwise.
    shared = [arms for arms in whole if every.keys() == arms.keys()]

    def rank(name: str) -> tuple[float, int]:
        return -sum(arms[name]["area"]["value"] for arms in shared), -sum(name in arms for arms in whole)

    rows = [
        [_named(name, every[name]), *(c for arms in whole for c in cells(name, arms))]
        for name in sorted(every, key=rank)
    ]
    tasks = ((f"{setting['task'].replace('_', ' ')}: area", f"at {SHARES[0]:.0%}") for setting in shown)
    return markdown_table([size, *(column for columns in tasks for column in columns)], rows)


FRESH = (
    "On fresh seeds: adaptation / retention of the setting that the other seeds choose, the mean over as many as are "
    "in parentheses; (1 of 3): with one of them the others have a setting that reaches 95% of the best adaptation, "
    "with the rest it is the one that learns most, whatever it keeps."
)


def _fresh(settings: Sequence[Mapping[str, Any]], compared: Collection[str]) -> list[str]:
    """A table a size: what the choice of a setting is worth where it was not made, on every task."""
    tables = []
    for size, shown in _by_size(settings):
        wholes = [whole_arms(setting, compared) for setting in shown]
        tried = [{name: own for name, own in arms.items() if own["fresh"]["seeds"]} for arms in wholes]
        columns = [place for place, arms in enumerate(tried) if arms]
        names = {name: own for place in columns for name, own in tried[place].items()}
        header = [f"{size}, fresh seeds", *(shown[place]["task"].replace("_", " ") for place in columns)]
        rows = [
            [_named(name, own), *(_learned_and_kept(tried[place].get(name)) for place in columns)]
            for name, own in sorted(names.items(), key=lambda item: list(compared).index(item[0]))
        ]
        tables += [markdown_table(header, rows)] if columns else []
    return tables or ["None yet."]


ELSEWHERE = (
    "Untuned: on each table the setting that the arm is best with on the *other* tables, on those of other tasks, on "
    "those of other bases (best: of the settings that learn 95% of the most there, on average, it keeps most). "
    "Learned, as a share of the most that any arm learns on the table, / kept: means over tables, the least in "
    "parentheses. (1 of 3): for one of them a setting reached the 95% elsewhere, for the rest it is the one that "
    "learns most."
)


def _elsewhere(found: Mapping[str, Any]) -> str:
    """A row an arm, the columns by what has no say in the choice."""
    named = {name: _named(name, own) for setting in found["settings"] for name, own in setting["arms"].items()}
    header = ["untuned", *(f"chosen on other {way}s" for way in LEFT_OUT)]
    rows = [
        [named[name], *(_untuned(own.get(way)) for way in LEFT_OUT)]
        for name, own in sorted(found["elsewhere"].items(), key=lambda item: found["compared"].index(item[0]))
    ]
    return markdown_table(header, rows)


def _untuned(own: Mapping[str, Any] | None) -> str:
    if own is None:
        return NONE
    learned, kept = (f"{score(own[key])} ({score(own[f'{key}_least'])})" for key in ("learned", "kept"))
    tables, reached = len(own["chosen"]), own["reached"]
    return f"{learned} / {kept}" + ("" if reached == tables else f" ({reached} of {tables})")


def _learned_and_kept(own: Mapping[str, Any] | None) -> str:
    if own is None:
        return NONE
    fresh = own["fresh"]
    tried, reached = fresh["seeds"], fresh["reached"]
    said = f"{tried}" if reached == tried else f"{reached} of {tried}"
    return f"{score(fresh['adaptation'])} / {interval(fresh['retention'])} ({said})"


def _base(setting: Mapping[str, Any]) -> str:
    base = setting["base"]
    known = ", ".join(f"{piece} {score(value)}" for piece, value in base["retention_by"].items())
    return (
        f"Best adaptation of any arm: {score(setting['best_adaptation'])}. "
        f"The base: task {score(base['adaptation'])}, retention {score(base['retention'])} ({known})."
    )


def _by_area(rows: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(rows.items(), key=lambda item: -(item[1]["area"]["value"] or 0.0))


def _named(name: str, own: Mapping[str, Any]) -> str:
    return f"**{name}**" if own["method"] in OURS else name


def _arms_table(setting: Mapping[str, Any]) -> str:
    """What tuning gets out of each arm."""
    header = ["arm", "rank", "trained", "matched", "settings", "seeds", "area"]
    header += [*(f"at {share:.0%}" for share in SHARES), "lr", "wd", "spread", "interference"]
    rows = []
    for name, own in _by_area(setting["arms"]):
        first = [_named(name, own), str(own["rank"]), f"{own['trained_parameters']:,}", own["matched"]]
        planned, missing = own["planned"], own["missing"]
        run = f"{planned - missing} of {planned}" if missing else str(own["settings"])
        rows.append([*first, run, str(own["seeds"]), *_scores(own), *_chosen(own["chosen"], with_decay=True)])
    return markdown_table(header, rows)


def _variants_table(variants: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    header = ["arm", "area", *(f"at {share:.0%}" for share in SHARES)]
    header += ["band", "lr", "spread", "interference", "s", "cpu s"]
    rows = [
        [
            _named(name, own),
            *_scores(own),
            f"{'' if own['band_ends'] else '≥ '}{own['band']:.2f}",
            *_chosen(own["chosen"], with_decay=False),
            *(NONE if own[key] is None else f"{own[key]:.1f}" for key in COSTS),
        ]
        for name, own in variants
    ]
    return markdown_table(header, rows)


def _scores(own: Mapping[str, Any]) -> list[str]:
    return [interval(own["area"]), *(interval(own["retention_at"][f"{share:g}"]) for share in SHARES)]


def _chosen(chosen: Mapping[str, Any] | None, *, with_decay: bool) -> list[str]:
    if chosen is None:
        return [NONE] * (4 if with_decay else 3)
    decay = [f"{chosen['weight_decay']:g}"] if with_decay else []
    spread = f"{score(chosen['adaptation_spread'])} / {score(chosen['retention_spread'])}"
    return [f"{chosen['learning_rate']:g}", *decay, spread, f"{chosen['interference']:.3f}"]


def _pieces_table(setting: Mapping[str, Any]) -> str:
    """What is left of each piece at the chosen setting; a star where the calibration texts exercise it."""
    pieces = list(setting["base"]["retention_by"])
    rows = []
    for name, own in _by_area(setting["arms"]):
        if own["chosen"] is None:
            continue
        kept = own["chosen"]["retention_by"]
        rows.append([name, *(f"{score(kept[piece])}{'*' if piece in own['covered'] else ''}" for piece in pieces)])
    if not rows:
        return "No arm reaches 95% of the best adaptation."
    said = "Accuracy by piece of knowledge at the setting chosen for 95%; * is exercised by the calibration texts:"
    return f"{said}\n\n{markdown_table(['arm', *pieces], rows)}"


def _sweep(sweep: Mapping[str, Any], plots: Sequence[Path]) -> list[str]:
    """A grid along weight decay, in the order of arms and decays."""
    title = f"{sweep['grid']}: along weight decay, {sweep['size']}, {sweep['task']}"
    parts = [
        f"## {title}",
        f"The learning rate tuned for each; best adaptation {score(sweep['best_adaptation'])}.",
        _variants_table(sweep["variants"].items()),
    ]
    return parts + [f"![{title}]({path})" for path in plots if path.name == plot_of(sweep)]


def _with_spread(point: Mapping[str, Any], name: str) -> str:
    spread = point[f"{name}_spread"]
    return score(point[name]) + ("" if spread is None else f" ± {score(spread)}")


def _curve(curve: Mapping[str, Any], plots: Sequence[Path]) -> list[str]:
    """A grid that runs along something else than the method."""
    title = f"{curve['grid']}: along {curve['along']}, {curve['size']}, {curve['task']}"
    pieces = list(curve["base"]["retention_by"])
    rows = [
        [
            "none" if point["value"] is None else f"{point['value']}",
            f"{point['learning_rate']:g}",
            str(point["seeds"]),
            *(_with_spread(point, name) for name in ("adaptation", "retention")),
            f"{point['interference']:.4f}",
            *(score(point["retention_by"][piece]) for piece in pieces),
        ]
        for point in curve["points"]
    ]
    header = [curve["along"], "lr", "seeds", "adaptation", "retention", "interference", *pieces]
    parts = [f"## {title}", "Means and standard deviations over seeds:", markdown_table(header, rows)]
    if "monotone" in curve:
        against = curve["monotone"]
        parts.append(
            "One dial: the most by which, at one learning rate, a larger budget went with more retention is "
            f"{score(against['retention'])}, with less adaptation {score(against['adaptation'])}; "
            "0 is monotone."
        )
    return parts + [f"![{title}]({path})" for path in plots if path.name == plot_of(curve)]
