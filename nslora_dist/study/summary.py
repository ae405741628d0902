"""``summary.md`` and ``summary.json``: every figure is computed from ``cells.jsonl``, and from nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nslora_dist import artifacts
from nslora_dist.card import markdown_table
from nslora_dist.study.analysis import ALLOWED, KEEPS, LOST, SHARES, Line, analyse
from nslora_dist.study.lines import round_floats
from nslora_dist.study.plots import draw_study

NONE = "–"
OURS = ("lora_null", "null_lora")


def summarise(folder: Path, lines: Sequence[Line], *, name: str, missing: int = 0, draws: int = 1000) -> Path:
    """Analyses, draws and writes.

    Args:
        folder: gets ``summary.json``, ``summary.md`` and ``plots/``.
        lines: of the study's cells.
        name: of the study.
        missing: cells that have no line yet, which the summary says.
        draws: bootstrap resamples.

    Returns:
        The Markdown file.
    """
    found = round_floats(analyse(lines, draws=draws))
    artifacts.write_json(folder / "summary.json", found)
    plots = [path.relative_to(folder) for path in draw_study(folder / "plots", lines)]
    path = folder / "summary.md"
    artifacts.write_text(path, text_of(found, name=name, missing=missing, plots=plots))
    return path


def text_of(found: Mapping[str, Any], *, name: str, missing: int, plots: Sequence[Path]) -> str:
    """The Markdown of ``analyse``'s figures."""
    parts = [f"# Study {name}: {found['cells']} cells"]
    if missing:
        parts.append(f"**Unfinished: {missing} cells are missing.**")
    parts.append(HOW)
    for setting in found["settings"]:
        title = f"{setting['size']}, {setting['task']}, calibrated on {setting['calibration']}"
        parts += [f"## {title}", _base(setting), _frontier_table(setting), _pieces_table(setting)]
        key = f"{setting['size']}_{setting['task']}_{setting['calibration']}.png"
        parts += [f"![{title}]({path})" for path in plots if path.name in (f"frontier_{key}", f"rates_{key}")]
    parts += _prediction(found["prediction"])
    parts += [f"![{path.stem}]({path})" for path in plots if path.stem in ("prediction", "probes")]
    return "\n\n".join(parts) + "\n"


HOW = (
    "Retention is the mean over pieces of knowledge, over the base's own. *Area*: under the frontier, the most "
    "retention to be had at an adaptation of at least t, t from 0 to 1. *At 95%, 99%*: the most retention of a setting "
    "that reaches that share of the best adaptation that any arm has on this task; – where none does. In brackets: 95% "
    "intervals over seeds, the setting chosen anew in each resample; with three seeds they are coarse. *Band*: decades "
    f"of learning rate in which at least 95% of the best adaptation is reached and {KEEPS:.0%} of the knowledge kept. "
    "*Spread*: standard deviation over seeds of adaptation / retention at the setting chosen for 95%, whose learning "
    "rate and interference (root mean square, calibration texts) stand beside it. *s*, *cpu s*: of a cell, by the "
    "clock and of the processor. Methods of this repository are set in bold; rows are in the order of their area."
)


def _base(setting: Mapping[str, Any]) -> str:
    base = setting["base"]
    known = ", ".join(f"{piece} {_score(value)}" for piece, value in base["retention_by"].items())
    return (
        f"Best adaptation of any arm: {_score(setting['best_adaptation'])}. "
        f"The base: task {_score(base['adaptation'])}, retention {_score(base['retention'])} ({known})."
    )


def _by_area(setting: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(setting["variants"].items(), key=lambda item: -(item[1]["area"]["value"] or 0.0))


def _frontier_table(setting: Mapping[str, Any]) -> str:
    header = ["arm", "rank", "trained", "matched", "seeds", "area", *(f"at {share:.0%}" for share in SHARES)]
    header += ["band", "lr", "spread", "interference", "s", "cpu s"]
    rows = []
    for name, own in _by_area(setting):
        chosen = own["chosen"]
        rows.append(
            [
                f"**{name}**" if own["method"] in OURS else name,
                str(own["rank"]),
                f"{own['trained_parameters']:,}",
                own["matched"],
                str(own["seeds"]),
                _interval(own["area"]),
                *(_interval(own["retention_at"][f"{share:g}"]) for share in SHARES),
                f"{own['band']:.2f}",
                NONE if chosen is None else f"{chosen['learning_rate']:g}",
                NONE
                if chosen is None
                else f"{_score(chosen['adaptation_spread'])} / {_score(chosen['retention_spread'])}",
                NONE if chosen is None else f"{chosen['interference']:.3f}",
                f"{own['seconds']:.1f}",
                f"{own['processor_seconds']:.1f}",
            ]
        )
    return markdown_table(header, rows)


def _pieces_table(setting: Mapping[str, Any]) -> str:
    """What is left of each piece at the chosen setting; a star where the calibration texts exercise it."""
    pieces = list(setting["base"]["retention_by"])
    rows = []
    for name, own in _by_area(setting):
        if own["chosen"] is None:
            continue
        kept = own["chosen_by_piece"]
        rows.append([name, *(f"{_score(kept[piece])}{'*' if piece in own['covered'] else ''}" for piece in pieces)])
    if not rows:
        return "No arm reaches 95% of the best adaptation."
    said = "Accuracy by piece of knowledge at the setting chosen for 95%; * is exercised by the calibration texts:"
    return f"{said}\n\n{markdown_table(['arm', *pieces], rows)}"


def _prediction(found: Mapping[str, Any]) -> list[str]:
    parts = [
        "## Forgetting, predicted",
        f"Spearman's rank correlation of interference with forgetting over the {found['cells']} cells whose texts "
        "exercise all that is asked; *within*: the mean over arms of each one's own. *Safe below*: the interference up "
        f"to which no cell, or at most {ALLOWED[-1]:.0%} of them, lost more than {LOST:.0%} of the answers. In "
        "brackets: 95% intervals over resampled variants.",
    ]
    rows = [
        [
            name.replace("_", " "),
            _interval(own["across"]),
            _score(own["within_mean"]),
            *(_interval(own["safe_below"][f"{allowed:g}"]) for allowed in ALLOWED),
        ]
        for name, own in found["aggregates"].items()
    ]
    if rows:
        header = ["aggregate", "across", "within", "safe below: none", f"safe below: {ALLOWED[-1]:.0%}"]
        parts.append(markdown_table(header, rows))
        arms = list(found["aggregates"]["rms"]["within"])
        own = [[arm, *(_score(a["within"].get(arm)) for a in found["aggregates"].values())] for arm in arms]
        header = ["within arm", *(name.replace("_", " ") for name in found["aggregates"])]
        parts.append(markdown_table(header, own))
    rows = [
        [piece, _interval(own["spearman"]), _interval(own["safe_below"])]
        for piece, own in found["probes"]["by_piece"].items()
    ]
    rows.append(["all together", _interval(found["probes"]["all"]), NONE])
    parts += ["Probe by probe, over all cells:", markdown_table(["piece", "across", "safe below: 5%"], rows)]
    return parts


def _score(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _interval(found: Mapping[str, Any]) -> str:
    value, low, high = found["value"], found["low"], found["high"]
    if value is None:
        return NONE
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"
