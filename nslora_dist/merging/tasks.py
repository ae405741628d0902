"""The adapters of a merge: read, scaled, and compared before anything is computed."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nslora_dist.errors import UserError
from nslora_dist.export import CONFIG_FILE, Factors, changes_base, module_scale, read_adapter
from nslora_dist.merge_recipe import MergeRecipe
from nslora_dist.provenance import Provenance, read_provenance
from nslora_dist.update_grams import read_update_grams

log = logging.getLogger("nslora_dist")

CONVERTIBLE = ("pissa", "corda", "olora", "lora_ga")
"""Initialisations that PEFT can take out of an adapter again as it saves it."""


@dataclass(frozen=True)
class StoredLora:
    """A LoRA folder as it lies on disk.

    Attributes:
        factors: module name → A (r, d_in) and B (d_out, r) in the file's dtype, on the CPU.
        scales: module name → s in ΔW = s B A (alpha / r, rsLoRA, patterns).
        heads: tensors of the modules that were saved whole.
        config: contents of ``adapter_config.json``.
    """

    factors: dict[str, Factors]
    scales: dict[str, float]
    heads: dict[str, Tensor]
    config: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One adapter.

    Attributes:
        name: its name in the recipe.
        factors: module name → A (r, d_in) as stored and B (d_out, r) with the scale (alpha / r, rsLoRA, patterns)
            in it, float32 on the CPU: ΔW = B A.
        heads: tensors of the modules that were saved whole.
        config: contents of ``adapter_config.json``.
        provenance: what it was made on, where its folder says so.
        grams: module name → C = A G Aᵀ (r, r), where its folder holds them.
    """

    name: str
    factors: dict[str, Factors]
    heads: dict[str, Tensor]
    config: dict[str, Any]
    provenance: Provenance | None
    grams: dict[str, Tensor] | None

    @property
    def base_name(self) -> str:
        """The base as the adapter names it."""
        return str(self.config.get("base_model_name_or_path") or "")


def read_tasks(recipe: MergeRecipe) -> list[Task]:
    """Reads every adapter and checks that they belong together, except for what the recipe allows to differ.

    Raises:
        UserError: a folder that is no readable LoRA adapter, or adapters that do not fit each other; it names both.
    """
    tasks = [_read(name, Path(adapter.path)) for name, adapter in recipe.adapters.items()]
    compare(tasks, recipe.allow_mismatch)
    return tasks


def _read(name: str, folder: Path) -> Task:
    stored = read_stored(f"adapters.{name}.path {folder}", folder)
    factors = {
        module: Factors(pair.lora_a.float(), pair.lora_b.float() * stored.scales[module])
        for module, pair in stored.factors.items()
    }
    return Task(name, factors, stored.heads, stored.config, read_provenance(folder), read_update_grams(folder))


def read_stored(where: str, folder: Path) -> StoredLora:
    """Reads one PEFT LoRA folder, whoever wrote it.

    Args:
        where: what messages call it.
        folder: the adapter's.

    Raises:
        UserError: no readable LoRA adapter, or one that is no sum of low-rank updates of the base's plain linears.
    """
    if not folder.is_dir():
        raise UserError(f"{where}: no such folder; give the folder of a PEFT adapter")
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{where}: no adapter there, it holds no {CONFIG_FILE}; give the folder of a PEFT adapter")
    heads: dict[str, Tensor] = {}
    factors, config = read_adapter(folder, heads=heads)
    _check_kind(where, config)
    for key, rank in (config.get("rank_pattern") or {}).items():
        if not isinstance(rank, int) or rank < 1:
            raise UserError(
                f"{where}: rank_pattern gives '{key}' the rank {rank}; a rank is 1 or more: export it again"
            )
    scales = {}
    for module, pair in factors.items():
        try:
            scales[module] = float(module_scale(config, module, pair.rank))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{where}: {CONFIG_FILE} has no usable lora_alpha for {module}") from error
        if not math.isfinite(scales[module]):
            raise UserError(f"{where}: the scale of {module} is {scales[module]}; mend lora_alpha in {CONFIG_FILE}")
    return StoredLora(factors, scales, heads, config)


def _check_kind(where: str, config: Mapping[str, Any]) -> None:
    """What changes the base or the layers beside A and B: without it the factors say something else."""
    if config.get("use_dora"):
        raise UserError(f"{where}: is a DoRA adapter (use_dora), which is no sum of low-rank updates; use plain LoRA")
    if config.get("fan_in_fan_out"):
        # A transposed weight would take a transposed update, and a square one would not even give itself away.
        raise UserError(f"{where}: adapts layers with transposed weights (fan_in_fan_out); only nn.Linear is read")
    if config.get("alora_invocation_tokens"):
        raise UserError(
            f"{where}: acts only behind its invocation tokens (alora_invocation_tokens), which no update of a weight "
            "does; use plain LoRA"
        )
    beside = ("use_bdlora", "kasa_config", "monteclora_config", "velora_config", "arrow_config")
    for key in ("target_parameters", "use_qalora", *beside):
        if config.get(key):
            raise UserError(
                f"{where}: was made with {key}, whose factors are no update of a plain linear's weight; use plain LoRA "
                "on target_modules"
            )
    if config.get("layer_replication"):
        raise UserError(
            f"{where}: adapts layers that it makes by copying the base's (layer_replication), and the base has them "
            "not; save the enlarged model, and train on that as the base"
        )
    start = config.get("init_lora_weights")
    if changes_base(start):
        remedy = "use an adapter made with init_lora_weights=True"
        if str(start).lower().startswith(CONVERTIBLE):
            remedy = (
                "make a plain LoRA of it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=the "
                "adapter as saved before training)"
            )
        raise UserError(
            f"{where}: was made with init_lora_weights={start!r}, which changes the base's weights, and would be added "
            f"to the unchanged ones here; {remedy}"
        )


def compare(tasks: Sequence[Task], allowed: Sequence[str]) -> None:
    """Compares base, calibration and target modules of every adapter with those before it.

    The base is compared by its fingerprint where both adapters carry one, else by its name. An adapter that was
    calibrated on nothing, such as plain LoRA, fits any calibration: no method asks where an A comes from. Shapes that
    differ are always an error: such adapters cannot be added up.

    Raises:
        UserError: something differs that is not in ``allowed``.
    """
    for number, task in enumerate(tasks):
        told = set()
        for earlier in tasks[:number]:  # all of them: what the first does not say, the second may
            for kind, ours, theirs in _differences(earlier, task):
                said = f"adapters {earlier.name} and {task.name} differ in their {kind}: {ours} and {theirs}"
                key = kind.replace(" ", "_")
                if key not in allowed:
                    raise UserError(f"{said}; merge what belongs together, or set allow_mismatch: [{key}]")
                if key not in told:
                    log.warning("%s (allowed by the recipe)", said)
                told.add(key)
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    for task in tasks:
        for module, pair in task.factors.items():
            shape = (pair.lora_b.shape[0], pair.lora_a.shape[1])
            other, known = shapes.setdefault(module, (task.name, shape))
            if shape != known:
                raise UserError(
                    f"adapters {other} and {task.name} are of different bases: {module} is {known} and {shape}"
                )


def _differences(first: Task, other: Task) -> list[tuple[str, str, str]]:
    found = []
    mine, theirs = first.provenance, other.provenance
    if mine is not None and theirs is not None:
        if mine.base != theirs.base:
            found.append(("base", f"{mine.base_model} ({mine.base[:12]})", f"{theirs.base_model} ({theirs.base[:12]})"))
        if None not in (mine.calibration, theirs.calibration) and mine.calibration != theirs.calibration:
            found.append(("calibration", str(mine.calibration)[:12], str(theirs.calibration)[:12]))
    elif _same_name(first.base_name) != _same_name(other.base_name):
        found.append(("base", first.base_name or "none named", other.base_name or "none named"))
    ours, others = set(first.factors), set(other.factors)
    if ours != others:
        example = min(ours ^ others)
        has = [f"{len(s)} modules {'with' if example in s else 'without'} {example}" for s in (ours, others)]
        found.append(("target modules", has[0], has[1]))
    return found


def same_base(named: str, path: str) -> bool:
    """Whether a base that an adapter names may be the one at a path or hub name: a local copy keeps the last part."""
    if _same_name(named) == _same_name(path) or Path(named).name.lower() == Path(path).name.lower():
        return True
    return f"models--{named.replace('/', '--')}" in Path(path).parts  # the hub's cache


def _same_name(name: str) -> str:
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name
