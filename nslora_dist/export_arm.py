"""From a trained arm in its engine to its PEFT folder: what the card tells, and which modules PEFT is to look for."""

from pathlib import Path
from typing import Any

from nslora_dist import dist
from nslora_dist.base_model import torch_dtype
from nslora_dist.calibration.store import NullSpace
from nslora_dist.calibration.weights import WeightNullSpace
from nslora_dist.calibration_data import CalibrationTexts
from nslora_dist.engines import Engine
from nslora_dist.export import fitting_targets, gather_factors, write_adapter
from nslora_dist.recipe import Recipe


def export(
    engine: Engine,
    arm: Recipe,
    folder: Path,
    report: dict[str, Any],
    *,
    texts: list[CalibrationTexts],
    evaluated: str,
    null_space: NullSpace | WeightNullSpace | None = None,
) -> None:
    """Gathers the adapter module by module and writes it in PEFT's format on the original base."""
    weights = null_space if isinstance(null_space, WeightNullSpace) else None
    left_out = [] if weights is None else weights.left_out(arm.adapter.rank)
    bases = None if weights is None else weights.tensors
    factors = gather_factors(engine, torch_dtype(arm.base_model), null_bases=bases)
    adapter, section = arm.adapter, arm.calibration
    described = {t.name: {"sequences": len(t.calibration), "tokens": sum(map(len, t.calibration))} for t in texts}
    card = {
        "name": f"{arm.name} ({evaluated})",
        "method": adapter.method,
        "form": adapter.form,
        "a_init": {"lora_null": adapter.a_init, "lora": "random", "null_lora": "zero"}[adapter.method],
        "freeze_a": None if adapter.method == "null_lora" else adapter.a_is_frozen,
        "quantization": arm.base_model.quantization,
        "sources": {n: described[n] | {"path": s.path, "weight": s.weight} for n, s in section.sources.items()},
        "probes": {n: described[n] | {"path": s.path} for n, s in section.probes.items()},
        "leak": report["leak"] if adapter.method == "lora_null" else None,
        "weight_null_space": None if weights is None else weights.facts(adapter.rank),
        "interference": report["interference_by_arm"][evaluated],
        "evaluation": {n: report["evaluation"][n] for n in ("base", evaluated)},
    }
    with dist.together("writing the adapter"):
        if dist.is_main():
            write_adapter(
                folder,
                factors,
                scale=adapter.scale,
                base_model=arm.base_model.path,
                revision=arm.base_model.revision,
                target_modules=fitting_targets(adapter.target_modules, factors, left_out),
                card=card,
            )
