"""The adapter's interference on calibration texts and probes, and what it is summed up to (METHODS.md §1c, §1d)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nslora_dist.adapter import observed
from nslora_dist.calibration.store import MIXTURE
from nslora_dist.calibration_data import CalibrationTexts, text_batches
from nslora_dist.engines import Engine

WRITERS = ("o_proj", "down_proj")
"""The linears whose output is added to the residual stream."""


@dataclass(frozen=True)
class Energies:
    """One text's sums: module → Σ‖ΔW x‖², Σ‖W x‖², Σ‖x‖², stacked as (3,) float64."""

    name: str
    weight: float | None
    sums: dict[str, Tensor]


def energies(
    engine: Engine, texts: Sequence[CalibrationTexts], *, batch_size: int, device: torch.device
) -> list[Energies]:
    """Runs the base over every text, the adapter measured beside it: one process, every kind of adapter alike."""
    found = []
    for text in texts:
        with observed(engine.model) as seen:
            for batch in text_batches(text.calibration, batch_size=batch_size, rank=0, world_size=1):
                real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
                seen.mask = real.bool().to(device)
                engine.matches(batch.to(device))
        sums = {
            name: torch.stack([seen.update[name], seen.output[name], seen.input[name]]).cpu() for name in seen.update
        }
        found.append(Energies(text.name, text.weight, sums))
    return found


def few_of(texts: Sequence[CalibrationTexts], count: int) -> list[CalibrationTexts]:
    """The sources, cut to their first ``count`` sequences; probes are left out."""
    return [replace(text, calibration=text.calibration[:count]) for text in texts if text.weight is not None]


def mixture(found: Sequence[Energies]) -> dict[str, Tensor]:
    """Module → the sources' sums, each by its weight over the energy of its inputs, as its Gram in METHODS.md §1d."""
    mixed: dict[str, Tensor] = {}
    for text in found:
        if text.weight is not None:
            for module, sums in text.sums.items():
                share = text.weight / sums[2] * sums
                mixed[module] = mixed[module] + share if module in mixed else share
    return mixed


def summed_up(found: Sequence[Energies], moved: Mapping[str, float]) -> dict[str, Any]:
    """``calibration`` (the mixture of the sources), ``sources`` and ``probes`` → ``spec.AGGREGATES`` of each.

    Args:
        found: the texts' energies.
        moved: their ``evaluate.divergence``.
    """

    def of(text: Energies) -> dict[str, Any]:
        return aggregates(text.sums) | {"kl": moved[text.name]}

    return {
        "calibration": aggregates(mixture(found)) | {"kl": moved[MIXTURE]},
        "sources": {text.name: of(text) for text in found if text.weight is not None},
        "probes": {text.name: of(text) for text in found if text.weight is None},
    }


def aggregates(sums: Mapping[str, Tensor]) -> dict[str, Any]:
    """``spec.AGGREGATES`` but for the divergence, and ``by_depth``, the root mean square of each block.

    ``sums`` maps a module to its (update, output, ...) energies.

    ``output_weighted`` is √(Σ‖ΔW x‖² / Σ‖W x‖²) over all modules together: one with a small output hardly counts.
    """
    values = {module: float((energy[0] / energy[1]).sqrt()) for module, energy in sums.items()}
    whole = torch.stack(list(sums.values())).sum(0)
    blocks: dict[int, list[float]] = {}
    for module, value in values.items():
        number = re.search(r"\.layers\.(\d+)\.", module)
        blocks.setdefault(int(number[1]) if number else 0, []).append(value)
    by_depth = [_rms(blocks[number]) for number in sorted(blocks)]
    writers = [value for module, value in values.items() if module.rsplit(".", 1)[-1] in WRITERS]
    return {
        "rms": _rms(list(values.values())),
        "max": max(values.values()),
        "mean": sum(values.values()) / len(values),
        "output_weighted": float((whole[0] / whole[1]).sqrt()),
        "writers": _rms(writers) if writers else None,
        "first_block": by_depth[0],
        "last_block": by_depth[-1],
        "by_depth": by_depth,
    }


def _rms(values: Sequence[float]) -> float:
    return float((sum(value * value for value in values) / len(values)) ** 0.5)
