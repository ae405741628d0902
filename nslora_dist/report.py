"""What a run leaves for people and tools to read: report.json, report.md, plots, and the scalars while it runs."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from nslora_dist import dist
from nslora_dist.artifacts import naming, write_json, write_text
from nslora_dist.card import (
    INTERFERENCE,
    arm_label,
    evaluation_table,
    interference_tables,
    lm_eval_table,
    markdown_table,
    number,
    ordered_arms,
    percent,
    weight_null_table,
)
from nslora_dist.plots import CAPTIONS, draw_plots, interference_by_arm, log_spaced, own_arm
from nslora_dist.redact import redact_all

WRITTEN = (
    ("adapter", "adapter"),
    ("null space", "null_space"),
    ("weights' null space", "weight_null_space"),
    ("recipe", "recipe.yaml"),
    ("report", "report.md"),
    ("report, JSON", "report.json"),
    ("plots", "plots"),
    ("tensorboard", "tensorboard"),
    ("checkpoints", "checkpoints"),
)


class Scalars:
    """TensorBoard scalars of one run, written by rank 0; on the other ranks every call does nothing.

    Args:
        folder: the event files' folder.
        start: the step from which on older events of an interrupted run are hidden.
    """

    def __init__(self, folder: Path, *, start: int = 0) -> None:
        self._writer = None
        self._folder = folder
        if dist.is_main():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=start, flush_secs=10)

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds each tag's value at ``step``; None is a value that was not measured and leaves no point."""
        if self._writer is None:
            return
        for tag, value in values.items():
            if value is not None:
                with naming(self._folder):
                    self._writer.add_scalar(tag, float(value), global_step=step)

    def close(self) -> None:
        """Writes out what is still held; safe to call twice."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with naming(self._folder):
                writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def spectrum_entry(eigenvalues: Tensor, rank: int, *, points: int = 256) -> dict[str, Any]:
    """One group's entry of ``report["spectra"]``, log-sampled: a 28,672-wide input need not fill the report.

    Args:
        eigenvalues: (d_in,), ascending.
        rank: how many of the smallest span the null space.
        points: at most this many are kept, denser where the eigenvalues are small.

    Returns:
        ``index`` (1 is the smallest), ``eigenvalues`` there, ``rank`` and ``size`` (d_in).
    """
    index = log_spaced(len(eigenvalues), points)
    values = eigenvalues.detach().double().cpu()
    return {
        "index": index,
        "eigenvalues": [float(values[i - 1]) for i in index],
        "rank": rank,
        "size": len(eigenvalues),
    }


def write_report(run: Path, report: Mapping[str, Any]) -> None:
    """Writes ``report.json``, ``report.md`` and ``plots/*.png`` into the run's folder; for rank 0.

    Every key may be missing or None. In the JSON, NaN and infinities become null. A plot without data is left out, and
    an older one of its name is deleted.

    Args:
        run: the run's folder, made if need be.
        report: ``recipe`` (resolved), ``engine``, ``world_size``, ``quantization``, ``losses`` (one an optimizer step),
            ``evaluation`` ({arm: {adaptation, retention, retention_by, learning_rate?, lm_eval?}}), ``interference``
            ({max, mean, rms, divergence, per_module, by_source, by_probe, budget?}), ``interference_by_arm``, ``leak``
            ({calibration, heldout, random}), ``seconds`` (by phase), ``tokens_per_second``, ``peak_memory_bytes``,
            ``peak_memory_by_phase``, ``adapter`` (path), ``data`` (counts),
            ``spectra`` ({group: {eigenvalues ascending, rank, index?, size?, modules?}}), ``weight_null_space`` ({arm:
            {threshold, dim, left_out, modules}}, as ``WeightNullSpace.facts``), ``rows`` ({set: counts, as
            ``RowCounts.facts``}), ``skipped`` (steps), ``trained_by`` ({arm: [{engine, world_size, from, to}]}).
    """
    run.mkdir(parents=True, exist_ok=True)
    clean = redact_all(strict(report))
    write_json(run / "report.json", clean)
    drawn = draw_plots(run / "plots", clean)
    write_text(run / "report.md", _markdown(clean, drawn))


def summary_table(report: Mapping[str, Any]) -> str:
    """The arms' table that a person reads in the terminal at the end, aligned, with what it comes to below."""
    report = strict(report)
    header, rows = _arms(report)
    if not rows:
        return "no arm was evaluated"
    first, second = zip(*(_two_lines(title) for title in header), strict=True)
    head = [first, second] if any(first) else [second]
    widths = [max(len(line[i]) for line in [*head, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        left = cells[0].ljust(widths[0])
        return "  ".join(
            [left, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()

    rule = "  ".join("-" * width for width in widths)
    verdict = _verdict(report)
    return "\n".join([*map(line, head), rule, *map(line, rows), *(["", verdict] if verdict else [])])


def written_paths(run: Path) -> str:
    """One line for each thing that the run has written: what it is, and its path."""
    found = [(what, run / name) for what, name in WRITTEN if (run / name).exists()]
    return "\n".join(f"{what:<19} {path}" for what, path in found)


def strict(value: Any) -> Any:
    """``value`` as strict JSON can hold it: no NaN, no infinity, no tensors, no paths, text as keys."""
    if isinstance(value, Mapping):
        return {str(key): strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict(inner) for inner in value]
    if isinstance(value, Tensor) or hasattr(value, "item"):  # numpy's numbers have .item too
        return strict(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, os.PathLike) else value


def _rms(interference: Mapping[str, Any]) -> float | None:
    values = [value for value in (interference.get("per_module") or {}).values() if value is not None]
    return math.sqrt(sum(value * value for value in values) / len(values)) if values else None


def _arms(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and one row an arm; columns that no arm has a value for are left out."""
    evaluation = report.get("evaluation") or {}
    header, rows = evaluation_table(evaluation)
    known = interference_by_arm(report)
    more: dict[str, Callable[[str], float | None]] = {
        "rms interference": lambda arm: _rms(known.get(arm, {})),
        "output divergence": lambda arm: known.get(arm, {}).get("divergence"),
        "max interference": lambda arm: known.get(arm, {}).get("max"),
        "learning rate": lambda arm: evaluation[arm].get("learning_rate"),
    }
    for title, value in more.items():
        column = [value(arm) for arm in ordered_arms(evaluation)]
        if any(entry is not None for entry in column):
            header = [*header, title]
            rows = [[*row, number(entry)] for row, entry in zip(rows, column, strict=True)]
    return header, rows


def _two_lines(title: str) -> tuple[str, str]:
    """A heading over two lines, so that a table of many columns fits a terminal."""
    first, _, last = title.rpartition(" ")
    return first, last


def _verdict(report: Mapping[str, Any]) -> str:
    """The run's adapter in one sentence, against the base and plain LoRA; empty where that cannot be said."""
    evaluation = report.get("evaluation") or {}
    own = own_arm(report)

    def share(key: str, of: str) -> str | None:
        mine, other = (evaluation.get(arm, {}).get(key) for arm in (own, of))
        return percent(mine / other) if mine is not None and other and of != own else None

    kept, learnt = share("retention", "base"), share("adaptation", "lora")
    said = [f"keeps {kept} of the base's retention" if kept else "", f"reaches {learnt} of plain LoRA's task accuracy"]
    said = [part for part, value in zip(said, (kept, learnt), strict=True) if value]
    return f"The {arm_label(own)} {' and '.join(said)}." if said else ""


def _markdown(report: Mapping[str, Any], drawn: Sequence[str]) -> str:
    recipe = report.get("recipe") or {}
    parts = [f"# {recipe.get('name', 'Run')}"]
    header, rows = _arms(report)
    if rows:
        parts += [markdown_table(header, rows), *filter(None, [_verdict(report)])]
    parts += [f"![{CAPTIONS[name]}](plots/{name}.png)" for name in drawn if name == "frontier"]
    if tables := lm_eval_table(report.get("evaluation") or {}):
        parts += ["## lm-eval", "EleutherAI's harness, value ± standard error.", *tables]
    if tables := interference_tables(report.get("interference") or {}):
        parts += [
            "## Interference",
            INTERFERENCE,
            *tables,
        ]
        parts += [f"![{CAPTIONS[name]}](plots/{name}.png)" for name in drawn if name == "interference"]
    if leak := report.get("leak"):
        rows = [[number(leak.get(key)) for key in ("calibration", "heldout", "random")]]
        parts += ["## Null space", "Share of the activations' energy that lies in the chosen null space (leak):"]
        parts += [markdown_table(["calibration texts", "held-out texts", "a random basis"], rows)]
    parts += [f"![{CAPTIONS[name]}](plots/{name}.png)" for name in drawn if name == "spectrum"]
    for arm, facts in (report.get("weight_null_space") or {}).items():
        parts += [f"## Null space of the weights, {arm_label(arm)}", *weight_null_table(facts)]
    parts += [*_rows_table(report), "## Run", _run_table(report)]
    parts += [f"![{CAPTIONS[name]}](plots/{name}.png)" for name in drawn if name == "loss"]
    return "\n\n".join(parts) + "\n"


def _trained_by(report: Mapping[str, Any]) -> str | None:
    """Which engines on how many ranks trained the recipe's own adapter, where it was not this start's alone."""
    stretches = (report.get("trained_by") or {}).get(own_arm(report)) or []
    here = (report.get("engine"), report.get("world_size"))
    if all((part["engine"], part["world_size"]) == here for part in stretches) and len(stretches) < 2:
        return None
    return ", ".join(f"{part['engine']} on {part['world_size']} to step {part['to']}" for part in stretches)


def _rows_table(report: Mapping[str, Any]) -> list[str]:
    """Of the sets of which rows were left out, cut or met twice; nothing where all rows are as they should be."""
    told = {
        name: {key.replace("_", " "): count for key, count in counts.items() if key != "rows" and count}
        for name, counts in (report.get("rows") or {}).items()
    }
    rows = [
        [name, str(report["rows"][name]["rows"]), ", ".join(f"{count} {what}" for what, count in found.items())]
        for name, found in told.items()
        if found
    ]
    return ["## Rows", markdown_table(["set", "rows read", "of them"], rows)] if rows else []


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _run_table(report: Mapping[str, Any]) -> str:
    losses = [loss for loss in report.get("losses") or [] if loss is not None]
    memory, speed = report.get("peak_memory_bytes"), report.get("tokens_per_second")
    facts = {
        "base model": ((report.get("recipe") or {}).get("base_model") or {}).get("path"),
        "engine": report.get("engine"),
        "ranks": report.get("world_size"),
        "quantization": report.get("quantization"),
        "steps": len(report.get("losses") or []) or None,
        "steps skipped, not finite": len(report.get("skipped") or []) or None,
        "trained by": _trained_by(report),
        "loss, first and last": f"{losses[0]:.4f} → {losses[-1]:.4f}" if losses else None,
        "tokens per second": None if speed is None else f"{speed:,.0f}",
        "peak memory a rank": None if memory is None else _gib(memory),
        **{f"peak memory, {phase}": _gib(size) for phase, size in (report.get("peak_memory_by_phase") or {}).items()},
        **{f"seconds, {phase}": number(s) for phase, s in (report.get("seconds") or {}).items()},
        **{f"data, {name.replace('_', ' ')}": count for name, count in (report.get("data") or {}).items()},
        "adapter": report.get("adapter"),
    }
    return markdown_table(["", "value"], [[key, str(value)] for key, value in facts.items() if value is not None])
