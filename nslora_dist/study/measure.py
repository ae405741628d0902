"""The adapter's interference on calibration texts and probes, and its summaries (docs/methods.md §1c, §1d)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nslora_dist.calibration.store import MIXTURE
from nslora_dist.calibration_data import CalibrationTexts
from nslora_dist.effects import Effect, divergence, mixture

WRITERS = ("o_proj", "down_proj")
"""The linears whose output is added to the residual stream."""


def few_of(texts: Sequence[CalibrationTexts], count: int) -> list[CalibrationTexts]:
    """The sources, cut to their first ``count`` sequences; probes are left out."""
    return [replace(text, calibration=text.calibration[:count]) for text in texts if text.weight is not None]


def summed_up(effects: Sequence[Effect]) -> dict[str, Any]:
    """``calibration`` (the mixture of the sources), ``sources`` and ``probes`` → ``spec.AGGREGATES`` of each."""
    moved = divergence(effects)

    def of(name: str, energies: Mapping[str, Tensor]) -> dict[str, Any]:
        return aggregates(energies) | {"kl": moved[name]}

    return {
        "calibration": of(MIXTURE, mixture(effects)),
        "sources": {effect.name: of(effect.name, effect.energies) for effect in effects if effect.weight is not None},
        "probes": {effect.name: of(effect.name, effect.energies) for effect in effects if effect.weight is None},
    }


def aggregates(energies: Mapping[str, Tensor]) -> dict[str, Any]:
    """``spec.AGGREGATES`` but for the divergence, and ``by_depth``, the root mean square of each block.

    ``energies`` are an ``effects.Effect``'s.

    ``output_weighted`` is √(Σ‖ΔW x‖² / Σ‖W x‖²) over all modules together: one with a small output hardly counts.
    """
    values = {module: float((energy[0] / energy[1]).sqrt()) for module, energy in energies.items()}
    whole = torch.stack(list(energies.values())).sum(0)
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
