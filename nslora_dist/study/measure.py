"""The adapter's interference on calibration texts and probes, and what it is summed up to (METHODS.md §1c, §1d)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nslora_dist.adapter import observed
from nslora_dist.calibration_data import CalibrationTexts, text_batches
from nslora_dist.engines import Engine

WRITERS = ("o_proj", "down_proj")
"""The linears whose output is added to the residual stream."""


@dataclass(frozen=True)
class Energies:
    """One text's sums.

    Attributes:
        name: of the source or probe.
        weight: of a source; None for a probe.
        sums: module → Σ‖ΔW x‖², Σ‖W x‖², Σ‖x‖² on the base's activations, stacked as (3,) float64.
        kl: mean over tokens of KL(base ‖ adapted), in nats, of the next token's distribution.
    """

    name: str
    weight: float | None
    sums: dict[str, Tensor]
    kl: float


@torch.no_grad()
def energies(
    engine: Engine, texts: Sequence[CalibrationTexts], *, batch_size: int, device: torch.device
) -> list[Energies]:
    """Runs every text through the base, the adapter measured beside it, and through the adapted model.

    One process, every kind of adapter alike. Interference looks at each module by itself, at the base's inputs; the
    divergence sees what all of them come to together.
    """
    model: Any = engine.model
    model.eval()
    found = []
    for text in texts:
        batches = [
            (batch, torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask)
            for batch in text_batches(text.calibration, batch_size=batch_size, rank=0, world_size=1)
        ]
        batches = [(batch.to(device), real.to(device)) for batch, real in batches]
        before = []
        with observed(engine.model) as seen:
            for batch, real in batches:
                seen.mask = real.bool()
                before.append(_log_probabilities(model, batch.input_ids, real))
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for (batch, real), base in zip(batches, before, strict=True):
            after = _log_probabilities(model, batch.input_ids, real)
            divergence = (base.exp() * (base - after)).sum(-1)[real.bool()]
            total += torch.stack([divergence.sum(dtype=torch.float64), real.sum()])
        sums = {
            name: torch.stack([seen.update[name], seen.output[name], seen.input[name]]).cpu() for name in seen.update
        }
        found.append(Energies(text.name, text.weight, sums, float(total[0] / total[1])))
    return found


def _log_probabilities(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """(b, s, vocabulary) float32."""
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits.float().log_softmax(-1)


def few_of(texts: Sequence[CalibrationTexts], count: int) -> list[CalibrationTexts]:
    """The sources, cut to their first ``count`` sequences; probes are left out."""
    return [replace(text, calibration=text.calibration[:count]) for text in texts if text.weight is not None]


def summed_up(found: Sequence[Energies]) -> dict[str, Any]:
    """``calibration`` (the mixture of the sources), ``sources`` and ``probes`` → ``spec.AGGREGATES`` of each.

    In the mixture a source counts by its weight over the energy of its inputs, as its Gram does in METHODS.md §1d; its
    divergence counts by its weight.
    """
    mixture: dict[str, Tensor] = {}
    sources = [text for text in found if text.weight is not None]
    for text in sources:
        for module, sums in text.sums.items():
            share = (text.weight or 0.0) / sums[2] * sums
            mixture[module] = mixture[module] + share if module in mixture else share
    whole = sum(text.weight or 0.0 for text in sources)
    kl = sum((text.weight or 0.0) * text.kl for text in sources) / whole
    return {
        "calibration": aggregates(mixture) | {"kl": kl},
        "sources": {text.name: aggregates(text.sums) | {"kl": text.kl} for text in sources},
        "probes": {text.name: aggregates(text.sums) | {"kl": text.kl} for text in found if text.weight is None},
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
