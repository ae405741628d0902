"""A recipe from 1 to 1,024 GPUs: a table and a plot."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nslora_dist.plan.advice import changed, largest_micro_batch
from nslora_dist.plan.cluster import Cluster
from nslora_dist.plan.phase import Plan
from nslora_dist.plan.phases import make_plan
from nslora_dist.plan.shapes import Shapes
from nslora_dist.recipe import Recipe

GPUS = tuple(2**power for power in range(11))


def sweep(recipe: Recipe, shapes: Shapes, cluster: Cluster, gpus: Sequence[int] = GPUS) -> list[Plan]:
    """One plan a number of GPUs; the global batch grows to the next that divides where the recipe's does not."""
    plans = []
    for count in gpus:
        rows = recipe.train.micro_batch_size * count
        size = recipe.train.global_batch_size
        batch = size if size % rows == 0 else rows * -(-size // rows)
        changes: dict[str, object] = {"train__global_batch_size": batch}
        if recipe.engine.name == "single" and count > 1:
            changes["engine__name"] = "fsdp2"
        plans.append(make_plan(changed(recipe, **changes), shapes, replace(cluster, gpus=count)))
    return plans


def rows_of(plans: Sequence[Plan]) -> list[dict[str, object]]:
    """One flat row a plan; bytes, seconds, FLOP; traffic is what one rank sends."""
    rows = []
    for plan in plans:
        row: dict[str, object] = {
            "gpus": plan.cluster.gpus,
            "fits": not plan.short_of(),
            "global_batch_size": plan.recipe.train.global_batch_size,
            "accumulation": plan.accumulation,
            "largest_micro_batch": largest_micro_batch(plan.recipe, plan.shapes, plan.cluster),
            "tokens_per_second": round(plan.tokens_per_second, 1),
        }
        for phase in plan.phases:
            row |= {
                f"{phase.name}_gpu_bytes": round(phase.gpu_bytes),
                f"{phase.name}_host_bytes_per_node": round(phase.host_bytes),
                f"{phase.name}_sent_bytes": round(phase.sent(plan.cluster.gpus)),
                f"{phase.name}_flops": round(phase.flops),
                f"{phase.name}_seconds": round(phase.seconds, 6),
            }
        rows.append(row)
    return rows


def write_csv(path: Path, plans: Sequence[Plan]) -> None:
    """Writes ``rows_of`` as CSV."""
    rows = rows_of(plans)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_plot(path: Path, plans: Sequence[Plan]) -> None:
    """Memory, time, traffic and throughput over the number of GPUs, as PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from nslora_dist.plots import COLORS, MARKERS, STYLE

    gpus = [plan.cluster.gpus for plan in plans]
    names = [phase.name for phase in plans[0].phases]
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(10.5, 7.2), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(2, 2, sharex=True)
        look = {name: {"color": COLORS[i], "marker": MARKERS[i], "markersize": 4} for i, name in enumerate(names)}
        for name in names:
            phases = [plan.phase(name) for plan in plans]
            if name != "solve":
                grid[0, 0].plot(gpus, [p.gpu_bytes / 1e9 for p in phases], label=name, **look[name])
                sent = [p.sent(g) / 1e9 for p, g in zip(phases, gpus, strict=True)]
                shown = [(g, s) for g, s in zip(gpus, sent, strict=True) if s > 0]
                if shown:
                    grid[1, 0].plot(*zip(*shown, strict=True), label=name, **look[name])
            label = "train, one step" if name == "train" else name
            grid[0, 1].plot(gpus, [p.seconds for p in phases], label=label, **look[name])
        usable = plans[0].cluster.usable / 1e9
        grid[0, 0].axhline(usable, color="black", linestyle="--", linewidth=1, label=f"usable, {usable:.0f} GB")
        fits = [not plan.short_of() for plan in plans]
        rates = [plan.tokens_per_second for plan in plans]
        grid[1, 1].plot(gpus, rates, color=COLORS[6], linewidth=1)
        for which, style, label in ((True, "o", "all phases fit"), (False, "x", "does not fit")):
            points = [(g, r) for g, r, fit in zip(gpus, rates, fits, strict=True) if fit == which]
            if points:
                grid[1, 1].plot(*zip(*points, strict=True), style, color=COLORS[2 if which else 1], label=label)
        titles = (
            (grid[0, 0], "highest GPU memory", "GB a GPU"),
            (grid[0, 1], "time", "seconds"),
            (grid[1, 0], "sent by a rank (train: one step)", "GB"),
            (grid[1, 1], "training throughput", "tokens a second"),
        )
        for axes, title, unit in titles:
            axes.set_title(title)
            axes.set_ylabel(unit)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(gpus, [str(g) for g in gpus])
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
        for axes in grid[1]:
            axes.set_xlabel("GPUs")
        recipe = plans[0].recipe
        base = recipe.base_model
        held = base.dtype if base.quantization == "none" else base.quantization
        figure.suptitle(f"{recipe.name}: {recipe.engine.name}, {held} base, on paper")
        figure.savefig(path)
