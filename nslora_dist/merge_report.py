"""What a merge leaves for people to read: a summary in the terminal, and the null-space profile as a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nslora_dist.card import markdown_table, number
from nslora_dist.merge_recipe import MergeRecipe
from nslora_dist.merging.tasks import read_tasks
from nslora_dist.plots import COLORS, STYLE


def merge_summary(report: Mapping[str, Any]) -> str:
    """A table of the adapters, with ω before and after where nsc measured it, and where everything was written."""
    header = ["adapter", "ranks", "coefficient", "ω before", "ω after"]
    nsc = report.get("nsc") or {}
    rows = []
    for name, adapter in report["adapters"].items():
        blocks = (nsc.get("profile") or {}).get(name) or {}
        shown = []
        for when in ("before", "after"):
            values = [block[when] for key, block in blocks.items() if key in nsc["target_blocks"]]
            shown.append(number(sum(values) / len(values) if values else None))
        coefficient = "by block or module" if nsc else number(adapter["coefficient"])
        rows.append([name, adapter["ranks"], coefficient, *shown])
    lines = [markdown_table(header, rows)]
    if report["compression_error"]["max"]:
        error, rank = report["compression_error"], report["recipe"]["target_rank"]
        lines.append(f"compressed to rank {rank}: relative error {error['mean']:.2g}, at most {error['max']:.2g}")
    return "\n\n".join(lines)


def draw_profile(path: Path, nsc: Mapping[str, Any]) -> None:
    """ω by block, each adapter under its own A on its own inputs: dashed before, drawn through after."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # its stub wants every key as a literal
        figure = Figure(figsize=(7.5, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        every = {block for blocks in nsc["profile"].values() for block in blocks}
        places = {block: place for place, block in enumerate(sorted(every, key=_in_order))}
        for position, (name, blocks) in enumerate(nsc["profile"].items()):
            color = COLORS[position % len(COLORS)]
            for when, style in (("before", "--"), ("after", "-")):
                values = [block[when] for block in blocks.values()]
                label = name if when == "after" else None
                axes.plot(
                    [places[block] for block in blocks],
                    values,
                    style,
                    color=color,
                    label=label,
                    marker="o",
                    markersize=3,
                )
        axes.set(xlabel="block", ylabel="null-space ratio ω", title="before (dashed) and after the search for λ")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        figure.savefig(path)


def _in_order(block: str) -> list[tuple[int, str]]:
    """Numbers in a block's name as numbers: ``layers.10`` comes behind ``layers.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in block.split(".")]


def describe_merge(recipe: MergeRecipe) -> str:
    """The text of ``--dry-run``: the resolved recipe and every adapter's modules and ranks, without the base."""
    lines = [recipe.to_yaml().rstrip(), ""]
    for task in read_tasks(recipe):
        ranks = sorted({pair.rank for pair in task.factors.values()})
        spread = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines.append(f"{task.name}: {len(task.factors)} modules, rank {spread}, base {task.base_name or 'not named'}")
    return "\n".join(lines)
