"""The report's plots: loss, spectra with the chosen null space, interference by layer, adaptation against retention."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nslora_dist.artifacts import naming
from nslora_dist.card import arm_label, ordered_arms
from nslora_dist.recipe import arm_name

if TYPE_CHECKING:  # matplotlib takes a second to import, and most ranks never draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 140,
}
EIGENVALUE_FLOOR = 1e-10
"""Shares of the largest eigenvalue below this are rounding, zero or negative; they are drawn at the floor."""


def draw_plots(folder: Path, report: Mapping[str, Any]) -> list[str]:
    """Draws every plot that the report has data for, and deletes an older one of a plot that it has none for.

    Args:
        folder: gets ``<name>.png``; made if need be.
        report: as ``write_report`` takes it, with no NaN in it.

    Returns:
        The names of those drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in PLOTS.items():
        path = folder / f"{name}.png"
        if _save(path, draw, report):
            drawn.append(name)
        else:
            path.unlink(missing_ok=True)
    return drawn


def own_arm(report: Mapping[str, Any]) -> str:
    """The recipe's own adapter among the arms."""
    adapter = (report.get("recipe") or {}).get("adapter") or {}
    return arm_name(str(adapter.get("method")), freeze_a=adapter.get("freeze_a"))


def interference_by_arm(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Each arm's interference, the recipe's own among them whichever key of the report holds it."""
    by_arm = {arm: known for arm, known in (report.get("interference_by_arm") or {}).items() if known}
    own = own_arm(report)
    if report.get("interference") and own not in by_arm:
        by_arm[own] = report["interference"]
    return by_arm


def log_spaced(count: int, points: int) -> list[int]:
    """At most ``points`` of 1..count, evenly spaced in their logarithm, both ends included."""
    if count <= points:
        return list(range(1, count + 1))
    return sorted({round(count ** (i / (points - 1))) for i in range(points)})


def _save(path: Path, draw: "Callable[[Figure, Mapping[str, Any]], bool]", report: Mapping[str, Any]) -> bool:
    """Draws one plot; False, and no file, where the report has nothing for it."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # its stub wants every key as a literal
        # A figure on the Agg canvas of its own: no display, no pyplot state shared with a caller's notebook.
        figure = Figure(figsize=(7.5, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        if not draw(figure, report):
            return False
        with naming(path):
            figure.savefig(path)
    return True


def _loss(figure: "Figure", report: Mapping[str, Any]) -> bool:
    points = [(step, loss) for step, loss in enumerate(report.get("losses") or [], 1) if loss is not None]
    if not points:
        return False
    steps, losses = zip(*points, strict=True)
    smooth, width = [losses[0]], max(len(losses) / 50, 1.0)
    for loss in losses[1:]:
        smooth.append(smooth[-1] + (loss - smooth[-1]) / width)
    axes = figure.subplots()
    many = len(losses) >= 20
    axes.plot(
        steps, losses, color=COLORS[0], linewidth=0.8 if many else 1.6, alpha=0.35 if many else 1, label="each step"
    )
    if many:
        axes.plot(steps, smooth, color=COLORS[0], linewidth=1.8, label=f"running mean of about {width:.0f} steps")
        axes.legend()
    if min(losses) > 0 and max(losses) > 20 * min(losses):
        _log_scale(axes)
    axes.set(xlabel="optimizer step", ylabel="loss per response token", title=CAPTIONS["loss"])
    return True


def _spectrum(figure: "Figure", report: Mapping[str, Any]) -> bool:
    panels: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for group, entry in (report.get("spectra") or {}).items():
        if any(value is not None and value > 0 for value in entry.get("eigenvalues") or []):
            layer, kind = _place(group)
            names = [name.rpartition(".")[2] for name in entry.get("modules") or [kind]]
            panels.setdefault(", ".join(names), []).append((layer, entry))
    if not panels:
        return False
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure.set_size_inches(4.2 * columns + 1.2, 2.7 * rows + 0.9)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    layers = [layer for panel in panels.values() for layer, _ in panel]
    dark = ListedColormap(colormaps["viridis"](range(230)))  # without its last yellow, lost on white
    norm = Normalize(min(layers), max(max(layers), min(layers) + 1))
    for axes, (kind, panel) in zip(grid.flat, panels.items(), strict=False):
        for layer, entry in panel:
            values = entry["eigenvalues"]
            index = entry.get("index") or range(1, len(values) + 1)
            kept = [i - 1 for i in log_spaced(len(values), 512) if values[i - 1] is not None]
            top = max(values[i] for i in kept)
            shares = [max(values[i] / top, EIGENVALUE_FLOOR) for i in kept]
            axes.plot([index[i] for i in kept], shares, color=dark(norm(layer)), linewidth=1.1)
        size, rank = max(entry.get("size") or len(entry["eigenvalues"]) for _, entry in panel), panel[0][1]["rank"]
        axes.axvspan(1, rank + 0.5, color=COLORS[4], alpha=0.18, linewidth=0)
        label = f"null space\n{rank} of {size:,}"
        axes.text(1.1, 0.96, label, transform=axes.get_xaxis_transform(), va="top", fontsize=9, color="#805600")
        axes.set(xscale="log", yscale="log", xlim=(1, size), title=f"input of {kind}")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("direction, from the smallest eigenvalue", fontsize=10)
    figure.supylabel("eigenvalue / largest", fontsize=10)
    if len(set(layers)) > 1:
        whole = MaxNLocator(integer=True)
        figure.colorbar(ScalarMappable(norm, dark), ax=grid, label="layer", aspect=30, ticks=whole)
    figure.suptitle(CAPTIONS["spectrum"], fontsize=11)
    return True


def _interference(figure: "Figure", report: Mapping[str, Any]) -> bool:
    arms: dict[str, dict[str, dict[int, float]]] = {}
    for arm, known in interference_by_arm(report).items():
        for module, value in (known.get("per_module") or {}).items():
            if value is not None:
                layer, kind = _place(module)
                arms.setdefault(arm, {}).setdefault(kind, {})[layer] = value
    if not arms:
        return False
    from matplotlib.ticker import MaxNLocator

    columns = min(len(arms), 2)
    rows = -(-len(arms) // columns)
    figure.set_size_inches(9 if columns > 1 else 7.5, 2.9 * rows + 1.1)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    kinds = list(dict.fromkeys(kind for lines in arms.values() for kind in lines))
    values = [value for lines in arms.values() for line in lines.values() for value in line.values()]
    handles = {}
    for axes, (arm, lines) in zip(grid.flat, arms.items(), strict=False):
        for kind, line in lines.items():
            which = kinds.index(kind)
            layers = sorted(line)
            (handles[kind],) = axes.plot(
                layers,
                [line[layer] for layer in layers],
                color=COLORS[which % len(COLORS)],
                marker=MARKERS[which % len(MARKERS)] if len(layers) <= 40 else None,
                markersize=4,
                linewidth=1.4 if len(layers) <= 40 else 1,
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(arm_label(arm))
        # Arms may lie a factor of ten apart; one linear scale would press the quieter one flat.
        if min(values) > 0 and max(values) > 8 * min(values):
            _log_scale(axes)
        else:
            axes.set_ylim(0, max(values) * 1.08 or 1)
    for axes in list(grid.flat)[len(arms) :]:
        axes.set_visible(False)
    figure.supxlabel("layer", fontsize=10)
    figure.supylabel("‖ΔW X‖ / ‖W X‖", fontsize=10)
    figure.legend([handles[kind] for kind in kinds], kinds, loc="outside right center")
    figure.suptitle(CAPTIONS["interference"], fontsize=11)
    return True


def _frontier(figure: "Figure", report: Mapping[str, Any]) -> bool:
    evaluation = report.get("evaluation") or {}
    points = {
        arm: (evaluation[arm]["adaptation"], evaluation[arm]["retention"])
        for arm in ordered_arms(evaluation)
        if evaluation[arm].get("adaptation") is not None and evaluation[arm].get("retention") is not None
    }
    if not points:
        return False
    axes = figure.subplots()
    for which, (arm, (x, y)) in enumerate(points.items()):
        color = "#333333" if arm == "base" else COLORS[which % len(COLORS)]
        axes.plot(x, y, MARKERS[which % len(MARKERS)], color=color, markersize=8, alpha=0.85, zorder=3)
    for limits, values in (
        (axes.set_xlim, [x for x, _ in points.values()]),
        (axes.set_ylim, [y for _, y in points.values()]),
    ):
        margin = max(0.12 * (max(values) - min(values)), 0.02)
        limits(max(min(values) - margin, -0.05), min(max(values) + margin, 1.05))
    if "base" in points:
        axes.axhline(points["base"][1], color="#333333", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for scale in (axes.xaxis, axes.yaxis):
        scale.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.set(xlabel="adaptation: accuracy on the new task", ylabel="retention: accuracy on what the base knew")
    axes.set_title(CAPTIONS["frontier"])
    _label_points(figure, axes, points)
    return True


def _label_points(figure: "Figure", axes: "Axes", points: Mapping[str, tuple[float, float]]) -> None:
    """Writes each arm's name beside its point, on the first side where it meets no name, point, base line or edge."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # only now is it settled where a point lies in pixels ...
    figure.set_layout_engine("none")  # ... and it stays settled: a label must not shrink the axes
    pixel = figure.dpi / 72
    at = [axes.transData.transform(point) for point in points.values()]
    taken = [Bbox.from_bounds(x - 7 * pixel, y - 7 * pixel, 14 * pixel, 14 * pixel) for x, y in at]
    if "base" in points:
        line = axes.transData.transform(points["base"])[1]
        taken.append(Bbox.from_extents(axes.bbox.x0, line - 1, axes.bbox.x1, line + 1))
    for arm, point in points.items():
        for dx, dy in [(dx * reach, dy * reach) for reach in (9, 18, 30, 45, 65, 90) for dx, dy in SIDES]:
            text = axes.annotate(
                arm_label(arm),
                point,
                (dx, dy),
                textcoords="offset points",
                ha="center" if dx == 0 else ("left" if dx > 0 else "right"),
                va="center" if dy == 0 else ("bottom" if dy > 0 else "top"),
                fontsize=9,
            )
            box = text.get_window_extent()
            inside = all(axes.bbox.contains(x, y) for x, y in ((box.x0, box.y0), (box.x1, box.y1)))
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
        else:  # no free place at all: beside the point, over whatever is there
            axes.annotate(arm_label(arm), point, (9, 0), textcoords="offset points", va="center", fontsize=9)
            continue
        if max(abs(dx), abs(dy)) > 9:
            leader = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5}
            axes.annotate("", point, (dx, dy), textcoords="offset points", arrowprops=leader)


def _log_scale(axes: "Axes") -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5: these ranges often span little more than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _place(name: str) -> tuple[int, str]:
    """The layer's number and the kind, the last part: ``model.layers.3.mlp.up_proj`` → 3, ``up_proj``."""
    number_in_name = re.search(r"\.(\d+)\.", name)
    return int(number_in_name[1]) if number_in_name else 0, name.rpartition(".")[2]


SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
CAPTIONS = {
    "loss": "Training loss",
    "spectrum": "Activation spectra and the chosen null space",
    "interference": "Interference by layer",
    "frontier": "Adaptation against retention",
}
PLOTS: "dict[str, Callable[[Figure, Mapping[str, Any]], bool]]" = {
    "loss": _loss,
    "spectrum": _spectrum,
    "interference": _interference,
    "frontier": _frontier,
}
