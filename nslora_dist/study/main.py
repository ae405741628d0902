"""``launch/study.py``: arguments → missing cells → summary."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nslora_dist import __version__, artifacts
from nslora_dist.errors import UserError
from nslora_dist.quiet import quiet
from nslora_dist.reasons import described
from nslora_dist.study.cells import Cell, cells_of
from nslora_dist.study.fresh import to_confirm
from nslora_dist.study.lines import FILE, of_cells, read_lines
from nslora_dist.study.run import missing, run_cells, usable
from nslora_dist.study.spec import Study, load_study

FILTERS = ("grid", "size", "task", "calibration", "arm", "seed")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description="Every method at many learning rates and seeds, cell by cell; resumable."
    )
    made.add_argument("--study", default="frontier", help="a name in recipes/studies/, or a path to a YAML file")
    made.add_argument("--quick", action="store_true", help="the toy study recipes/studies/quick.yaml: a minute")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="the study's folder; studies/<name>")
    made.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="cells at a time")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="of PyTorch, in each process")
    made.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where cells of sizes that need no GPU run; lines say where, costs are taken of those on the CPU alone",
    )
    made.add_argument("--minutes", type=float, metavar="N", help="begin no further cell after so long")
    made.add_argument("--dry-run", action="store_true", help="list the missing cells and say how long they take")
    made.add_argument(
        "--page", type=Path, metavar="TEMPLATE", help="fill this Markdown template with the summary's figures"
    )
    made.add_argument(
        "--section",
        nargs=2,
        type=Path,
        metavar=("DOCUMENT", "TEMPLATE"),
        help="fill this template, too, between <!-- TEMPLATE --> and <!-- /TEMPLATE --> in a document",
    )
    made.add_argument("--summary", action="store_true", help="only write the summary of the cells that are there")
    made.add_argument(
        "--confirm",
        action="store_true",
        help="only cells that try the setting that an arm's finished seeds choose on a further seed",
    )
    for name in FILTERS:
        made.add_argument(f"--{name}", nargs="+", metavar="NAME", help=f"only cells of this {name}")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the study.

    Returns:
        The exit status: 0, or one of ``errors.py`` after a one-line error.
    """
    given = parser().parse_args(arguments)
    quiet()
    try:
        if min(given.processes, given.threads) < 1:
            raise UserError("--processes and --threads: at least 1")
        study = load_study("quick" if given.quick else given.study, given.output)
        everything = cells_of(study)
        chosen = _filtered(everything, given)
        if given.confirm:
            chosen = _to_confirm(study, everything, chosen)
        if given.dry_run:
            print(describe(study, chosen, processes=given.processes))  # noqa: T201
            return 0
        left_over = 0
        if not given.summary:
            runnable, without = usable(study, chosen, device=given.device)
            if without:
                _say(f"left out, for they want a CUDA GPU: {', '.join(without)}")
            left_over = run_cells(
                study,
                runnable,
                processes=given.processes,
                threads=given.threads,
                device=given.device,
                version=version(),
                minutes=given.minutes,
                say=_say,
            )
        _summary(study, everything, may_be_none=left_over > 0, page=given.page, section=given.section)
        if left_over:
            _say(f"time is over: {left_over} cells are left; the same command continues")
    except Exception as error:
        found = described(error)
        print(f"error: {found}", file=sys.stderr, flush=True)  # noqa: T201
        return found.status
    return 0


def _summary(
    study: Study, cells: Sequence[Cell], *, may_be_none: bool, page: Path | None, section: Sequence[Path] | None
) -> None:
    from nslora_dist.study.summary import summarise

    folder = Path(study.output_dir)
    lines, torn = read_lines(folder / FILE)
    own = of_cells(lines, cells)
    if torn:
        _say(f"{folder / FILE}: {torn} lines could not be read and are passed over")
    if not own and may_be_none:  # time was over before the first: a base takes longer
        return
    if not own:
        raise UserError(f"{folder / FILE}: has no cell of this study yet")
    path = summarise(folder, own, study, missing=len(cells) - len(own))
    _say(f"{len(own)} of {len(cells)} cells are summed up in {path}")
    if page is None and section is None:
        return
    from nslora_dist.study.figures import Figures
    from nslora_dist.study.page import write_page, write_section

    figures = Figures(artifacts.read_json(folder / "summary.json"), path.read_text(encoding="utf-8"), own, len(cells))
    if page is not None:
        _say(f"page: {write_page(page, figures)}")
    if section is not None:
        document, template = section
        write_section(document, template, figures)
        _say(f"section: {document}")


def _filtered(cells: Sequence[Cell], given: argparse.Namespace) -> list[Cell]:
    for name in FILTERS:
        asked = getattr(given, name)
        if asked is None:
            continue
        known = {x for cell in cells for x in (cell.grids if name == "grid" else (str(getattr(cell, name)),))}
        for one in asked:
            if one not in known:
                raise UserError(f"--{name} {one}: no cell has it; there is {', '.join(sorted(known))}")
        cells = [
            cell for cell in cells if set(asked) & (set(cell.grids) if name == "grid" else {str(getattr(cell, name))})
        ]
    if not cells:
        raise UserError("no cell is left by the filters; give fewer of them")
    return list(cells)


def _to_confirm(study: Study, everything: Sequence[Cell], chosen: Sequence[Cell]) -> list[Cell]:
    from nslora_dist.study.analysis import analyse

    lines = of_cells(read_lines(Path(study.output_dir) / FILE)[0], everything)
    found = to_confirm(chosen, analyse(lines, study)["settings"])
    if not found:
        raise UserError(
            "--confirm: no arm among these has all its settings with one seed and a seed left to try; run those first"
        )
    return found


def describe(study: Study, cells: Sequence[Cell], *, processes: int) -> str:
    """The missing cells, and the time they take by the recipe's own figures."""
    todo = missing(study, cells)
    parts = [
        f"{cell.id} {cell.size} {cell.task} {cell.calibration} {cell.arm} "
        f"lr {cell.learning_rate:g} wd {cell.weight_decay:g} seed {cell.seed}"
        for cell in todo
    ]
    parts.append(f"{len(todo)} of {len(cells)} cells are missing in {study.output_dir}")
    for name, size in study.sizes.items():
        own = [cell for cell in todo if cell.size == name]
        if not own:
            continue
        text = f"{name} ({size.device}): {len(own)} cells"
        if size.seconds is None:
            text += " of an unmeasured time"
        else:
            shortest = min(study.training.steps.values())
            seconds = sum(size.seconds * study.steps_of(size, cell.task) / shortest for cell in own)
            text += f" of {size.seconds:g} s for {shortest} steps"
            text += f", {seconds / 3600 / processes:.1f} hours over {processes} processes"
        if size.minutes is not None:
            text += f"; its base {size.minutes:g} minutes, once"
        parts.append(text)
    return "\n".join(parts)


def version() -> str:
    """Of the package, and of the commit where this is a clone."""
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{done.stdout.strip()}"


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201
