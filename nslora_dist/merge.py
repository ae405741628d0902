"""``launch/merge.py``: adapters on disk → one adapter or one model on disk, with a report."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nslora_dist import artifacts, dist, folders, watch
from nslora_dist.base_config import load_config
from nslora_dist.base_files import BaseFiles, locate
from nslora_dist.errors import UserError, unwritable
from nslora_dist.export import Factors, write_adapter
from nslora_dist.merge_recipe import SPARSE, MergeRecipe, NscSection
from nslora_dist.merge_report import draw_profile, merge_summary
from nslora_dist.merging.blocks import block_of
from nslora_dist.merging.full_model import add_update, checkpoint_names, copy_base
from nslora_dist.merging.inputs import read_inputs
from nslora_dist.merging.merge import UNIT, Merged, merge_modules, module_names, shares_a
from nslora_dist.merging.model import AUTO_CLASSES, load_merged, model_task
from nslora_dist.merging.nsc import NscResult, optimise
from nslora_dist.merging.tasks import Task, read_tasks, same_base
from nslora_dist.provenance import Provenance, write_provenance
from nslora_dist.redact import redact_all

log = logging.getLogger("nslora_dist")


def run_merge(recipe: MergeRecipe, device: torch.device) -> None:
    """Merges what the recipe names and writes ``output_dir``; collective, rank 0 writes.

    Raises:
        UserError: whatever is wrong with the recipe, the adapters, the base or the inputs; nothing is written then.
    """
    started = time.perf_counter()
    folder = Path(recipe.output_dir)
    with watch.phase("reading the adapters"), dist.together("reading the adapters"):
        if folder.exists() or folder.is_symlink():
            raise UserError(f"output_dir {folder}: exists already; give output_dir=another/folder, or move it away")
        tasks = read_tasks(recipe)
        _check_base(recipe, tasks)
    shared = shares_a(tasks)
    report: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "world_size": dist.world_size(),
        "adapters": _describe(recipe, tasks),
        "shared_a": shared,
        "warnings": [],
    }
    coefficients = None
    if recipe.method == "nsc":
        found = _search(recipe, tasks, device)
        flat = found.flat(shared=shared)
        if flat is not None:
            report["warnings"].append(flat)
            log.warning("%s", flat)
        report["nsc"] = _nsc_report(recipe, tasks, found)
        coefficients = {m: found.coefficients[_row(recipe, m)] for m in module_names(tasks)}
    if recipe.method == "gram" and not shared:
        said = (
            "method gram: the adapters' A differ, and each task's Gram is known on the rows of its own A alone; "
            "elsewhere it is taken to have their mean energy, so the result lies near the tasks' mean"
        )
        report["warnings"].append(said)
        log.info("%s", said)
    if recipe.method in SPARSE and shared:
        # Dropping entries of ΔW = B A leaves the rows of A: measured, it undoes what a null-space A protects.
        said = (
            f"method {recipe.method}: the adapters share A, and a trimmed ΔW does not stay on its rows, so neither in "
            "a null space; use method gram, or arithmetic, which is exact at rank r"
        )
        report["warnings"].append(said)
        log.warning("%s", said)
    with watch.phase("writing the merge"), dist.together("writing the merge"):
        if dist.is_main():
            _write(recipe, tasks, folder, report, device=device, coefficients=coefficients, started=started)
            print(merge_summary(report))
            print(f"\n{recipe.output:<8} {folder / recipe.output}\nreport   {folder / 'report.json'}")


def _check_base(recipe: MergeRecipe, tasks: Sequence[Task]) -> None:
    """The recipe's base against the fingerprint that an adapter carries, or the name that a foreign one gives."""
    if recipe.base_model is None or "base" in recipe.allow_mismatch:
        return
    carried = [task for task in tasks if task.provenance is not None]
    for task in tasks:
        if task.provenance is None and task.base_name and not same_base(task.base_name, recipe.base_model.path):
            raise UserError(
                f"base_model.path {recipe.base_model.path}: adapters.{task.name} says that it was trained on "
                f"{task.base_name}; give that one, or allow_mismatch: [base] where this is the same under another name"
            )
    if not carried:
        return
    fingerprint = BaseFiles(locate(recipe.base_model)).fingerprint()
    for task in carried:
        assert task.provenance is not None
        if task.provenance.base != fingerprint:
            raise UserError(
                f"base_model.path {recipe.base_model.path}: is not the base of adapters.{task.name} "
                f"({task.provenance.base_model}, another fingerprint); give that one, or allow_mismatch: [base]"
            )


def _row(recipe: MergeRecipe, module: str) -> str:
    section = recipe.nsc or NscSection()
    return module if section.granularity == "module" else block_of(module)


def _search(recipe: MergeRecipe, tasks: Sequence[Task], device: torch.device) -> NscResult:
    section, base = recipe.nsc or NscSection(), recipe.base_model
    assert base is not None
    names = [task.name for task in tasks]
    inputs = read_inputs({name: recipe.inputs[name] for name in names}, base, seed=section.seed)
    initial = recipe.coefficients(section.initial)
    start = [initial[name] for name in names]
    with watch.phase("loading the base model"):
        model = load_merged(base, tasks, granularity=section.granularity, initial=start, device=device)
    with watch.phase("nsc"):
        return optimise(model, names, inputs, section, device=device)


def _nsc_report(recipe: MergeRecipe, tasks: Sequence[Task], found: NscResult) -> dict[str, Any]:
    section = recipe.nsc or NscSection()
    names = [task.name for task in tasks]
    values = asdict(found)
    values["coefficients"] = {row: dict(zip(names, v, strict=True)) for row, v in found.coefficients.items()}
    return values | {"granularity": section.granularity}


def _describe(recipe: MergeRecipe, tasks: Sequence[Task]) -> dict[str, Any]:
    given = recipe.coefficients((recipe.nsc or NscSection()).initial if recipe.method == "nsc" else UNIT)
    described = {}
    for task in tasks:
        ranks = sorted({pair.rank for pair in task.factors.values()})
        described[task.name] = {
            "path": recipe.adapters[task.name].path,
            "coefficient": given[task.name],
            "modules": len(task.factors),
            "ranks": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
            "heads": sorted(task.heads),
        }
    return described


def _write(
    recipe: MergeRecipe,
    tasks: Sequence[Task],
    folder: Path,
    report: dict[str, Any],
    *,
    device: torch.device,
    coefficients: Mapping[str, Sequence[float]] | None,
    started: float,
) -> None:
    """Everything or nothing, in one folder."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folders.replace_folder(folder) as partial:
            merged = merge_modules(recipe, tasks, device=device, coefficients=coefficients)
            errors, ranks = [], set()
            factors: dict[str, Factors] = {}
            model = _Model(recipe, tasks, partial / "model") if recipe.output == "model" else None
            for module, made in merged:
                errors.append(made.error)
                if model is not None:
                    model.add(module, made)
                else:
                    factors[module] = made.factors
                    ranks.add(made.factors.rank)
            if model is None:
                _write_adapter(recipe, tasks, partial / "adapter", folder / "adapter", factors)
            for task in tasks:
                if task.heads:
                    (partial / "heads").mkdir(exist_ok=True)
                    artifacts.save_tensors(partial / "heads" / f"{task.name}.safetensors", task.heads)
            if "nsc" in report:
                draw_profile(partial / "null_space_ratio.png", report["nsc"])
            report["rank"] = max(ranks, default=None)
            report["compression_error"] = {"max": max(errors), "mean": sum(errors) / len(errors)}
            report["seconds"] = time.perf_counter() - started
            artifacts.write_json(partial / "report.json", redact_all(report))
            artifacts.write_text(partial / "recipe.yaml", recipe.to_yaml())
    except OSError as error:
        raise unwritable(f"output_dir {folder}", error) from error


class _Model:
    """The full model under construction."""

    def __init__(self, recipe: MergeRecipe, tasks: Sequence[Task], target: Path) -> None:
        base = recipe.base_model
        assert base is not None
        self.target = target
        self.checkpoint = BaseFiles(locate(base))
        config = load_config(base)
        kind = model_task(base, tasks, config)
        self.names = checkpoint_names(module_names(tasks), self.checkpoint, config, kind=kind)
        target.mkdir()
        copy_base(self.checkpoint, target)

    def add(self, module: str, made: Merged) -> None:
        """Adds one module's update."""
        watch.progress(f"adding to {self.names[module]}")
        add_update(self.target, self.checkpoint.files, self.names[module], made.update)


def _write_adapter(
    recipe: MergeRecipe, tasks: Sequence[Task], target: Path, location: Path, factors: Mapping[str, Factors]
) -> None:
    base = recipe.base_model.path if recipe.base_model is not None else tasks[0].base_name
    revision = recipe.base_model.revision if recipe.base_model is not None else tasks[0].config.get("revision")
    kind = model_task(recipe.base_model, tasks)
    names = ", ".join(task.name for task in tasks)
    card: dict[str, Any] = {"name": recipe.name, "method": f"{recipe.method}, merged from {names}"}
    if kind != "causal_lm":
        card["auto_class"] = AUTO_CLASSES[kind]
    write_adapter(
        target,
        factors,
        scale=1.0,  # every scale is in B
        base_model=base,
        revision=revision,
        target_modules=_targets(tasks, factors),
        card=card,
        # PEFT would look for one head in the folder of a classifier; each task's own lies in heads/.
        task_type="CAUSAL_LM" if kind == "causal_lm" else None,
        location=location,
    )
    carried = [task.provenance for task in tasks if task.provenance is not None]
    if len(carried) == len(tasks) and len({p.base for p in carried}) == 1:
        calibrations = {p.calibration for p in carried}
        # A trimmed ΔW has left the rows of A, and with them whatever null space they were in.
        kept = len(calibrations) == 1 and recipe.method not in SPARSE
        calibration = calibrations.pop() if kept else None
        write_provenance(target, Provenance(carried[0].base, calibration, carried[0].base_model))


def _targets(tasks: Sequence[Task], factors: Mapping[str, Factors]) -> list[str]:
    """The adapters' own short target names where they say exactly which modules are adapted, else full names."""
    chosen: set[str] = set()
    for task in tasks:
        config = task.config
        listed = config.get("target_modules")
        narrowed = config.get("layers_to_transform") is not None or config.get("exclude_modules")
        if not isinstance(listed, list) or narrowed:
            return sorted(factors)
        chosen |= set(listed)
    used = {target for target in chosen if any(f".{module}".endswith(f".{target}") for module in factors)}
    fits = all(any(f".{module}".endswith(f".{target}") for target in used) for module in factors)
    return sorted(used) if fits else sorted(factors)
