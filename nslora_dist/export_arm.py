"""From a trained arm in its engine to its PEFT folder: what the card tells, and which modules PEFT is to look for."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nslora_dist import dist
from nslora_dist.arm_job import Arm
from nslora_dist.base_model import torch_dtype
from nslora_dist.calibration.store import NullSpace
from nslora_dist.calibration.weights import WeightNullSpace
from nslora_dist.calibration_data import CalibrationTexts
from nslora_dist.engines import Engine
from nslora_dist.export import fitting_targets, gather_factors, write_adapter
from nslora_dist.provenance import Provenance, write_provenance
from nslora_dist.update_grams import collect_update_grams, write_update_grams

TASK_SAMPLES = 256
"""Of the task's rows for the update Grams: as many as the paper calibrates on, r² numbers a module to be estimated."""


def export(
    engine: Engine,
    arm: Arm,
    folder: Path,
    report: dict[str, Any],
    *,
    texts: list[CalibrationTexts],
    base: str,
    device: torch.device,
) -> None:
    """Gathers the adapter module by module and writes it in PEFT's format on the original base.

    Beside PEFT's files: ``nslora.json`` says which base and calibration it belongs to, and ``update_grams.safetensors``
    what it reads of its own task's activations, both for merging.

    Args:
        engine: holds the trained arm.
        arm: what it is.
        folder: replaced whole if it exists.
        report: what the card quotes.
        texts: the calibration's, for the card.
        base: the base's fingerprint.
        device: this rank's.
    """
    recipe, null_space = arm.recipe, arm.null_space
    weights = null_space if isinstance(null_space, WeightNullSpace) else None
    left_out = [] if weights is None else weights.left_out(recipe.adapter.rank)
    bases = None if weights is None else weights.tensors
    factors = gather_factors(engine, torch_dtype(recipe.base_model), null_bases=bases)
    adapter, section = recipe.adapter, recipe.calibration
    described = {t.name: {"sequences": len(t.calibration), "tokens": sum(map(len, t.calibration))} for t in texts}
    card = {
        "name": f"{recipe.name} ({arm.name})",
        "method": adapter.method,
        "form": adapter.form,
        "a_init": {"lora_null": adapter.a_init, "lora": "random", "null_lora": "zero"}[adapter.method],
        "freeze_a": None if adapter.method == "null_lora" else adapter.a_is_frozen,
        "quantization": recipe.base_model.quantization,
        "sources": {n: described[n] | {"path": s.path, "weight": s.weight} for n, s in section.sources.items()},
        "probes": {n: described[n] | {"path": s.path} for n, s in section.probes.items()},
        "leak": report["leak"] if adapter.method == "lora_null" else None,
        "weight_null_space": None if weights is None else weights.facts(adapter.rank),
        "interference": report["interference_by_arm"][arm.name],
        "evaluation": {n: report["evaluation"][n] for n in ("base", arm.name)},
    }
    calibration = null_space.manifest["key"] if isinstance(null_space, NullSpace) else None
    grams = task_grams(engine, arm, device=device) if recipe.writes_update_grams else None

    def more(partial: Path) -> None:
        if grams is not None:
            write_update_grams(partial, grams)
        write_provenance(partial, Provenance(base, calibration, recipe.base_model.path))  # last: it hashes the others

    with dist.together("writing the adapter"):
        if dist.is_main():
            write_adapter(
                folder,
                factors,
                scale=adapter.scale,
                base_model=recipe.base_model.path,
                revision=recipe.base_model.revision,
                target_modules=fitting_targets(adapter.target_modules, factors, left_out),
                card=card,
                more=more,
            )


def task_grams(engine: Engine, arm: Arm, *, device: torch.device) -> dict[str, Tensor]:
    """C = A G Aᵀ of the first ``TASK_SAMPLES`` rows or packs of the first epoch, the adapter at work; collective."""
    data = arm.data
    steps = min(data.steps_per_epoch, -(-TASK_SAMPLES // arm.recipe.train.global_batch_size))
    batches = [
        batch
        for step in range(steps)
        for batch in data.micro_batches(step, rank=dist.rank(), world_size=dist.world_size())
    ]
    return collect_update_grams(engine.model, batches, engine.matches, device=device)
