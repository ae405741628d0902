"""What an adapter does to texts: interference, by a forward pass or from r × r matrices, and its divergence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nslora_dist import dist, watch
from nslora_dist.adapter import Observation, adapted_linears, observed
from nslora_dist.batches import filler, real_on
from nslora_dist.calibration.store import MIXTURE
from nslora_dist.calibration_data import CalibrationTexts, text_batches
from nslora_dist.data import Batch, TrainingData
from nslora_dist.engines import Engine
from nslora_dist.supervised import Compared

SMALLEST = 1e-300
"""In place of an energy of zero that something is divided by."""


@dataclass(frozen=True)
class Effect:
    """What an adapter does to one source or probe, over all ranks.

    Attributes:
        name: of the text.
        weight: in the mixture of the sources; None for a probe.
        energies: module → Σ‖ΔW x‖², Σ‖W x‖², Σ‖x‖² on the base's own activations, (3,) float64.
        divergence: mean over tokens of KL(base ‖ adapted) of the next token, in nats; None where it was not measured.
        grams: module → C = A G Aᵀ (r, r) float64; empty where it was not measured.
    """

    name: str
    weight: float | None
    energies: dict[str, Tensor]
    divergence: float | None
    grams: dict[str, Tensor] = field(default_factory=dict)


def measure(
    engine: Engine,
    texts: Sequence[CalibrationTexts],
    *,
    batch_size: int,
    device: torch.device,
    with_divergence: bool = True,
    with_grams: bool = False,
) -> list[Effect]:
    """Runs the base over every text, the adapter measured beside it, and then the adapted model; collective.

    Interference looks at each module by itself and at the base's own activations (docs/methods.md §1c). What all
    updates come to together, each reading what those before it have moved, it cannot see; the divergence can.
    The base's pass serves both.

    Args:
        engine: holds the adapter; every kind of it is measured alike.
        texts: sources and probes.
        batch_size: sequences of a rank at once.
        device: of the engine.
        with_divergence: without it there is one pass over the texts and not two.
        with_grams: C of every module as well, all of one rank.

    Raises:
        Preempted: a rank was asked to stop.
    """
    found = []
    for text in texts:
        batches = text_batches(text.calibration, batch_size=batch_size, rank=dist.rank(), world_size=dist.world_size())
        seen = Observation(grams={} if with_grams else None)
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in even_batches(batches, device=device):
            dist.stop_if_asked(f"stopped in the effect on {text.name}")
            watch.progress(f"effect on {text.name}")
            seen.real = real_on(device, batch)
            compared = Compared(**vars(batch.to(device)), real=seen.real)
            with observed(engine.model, seen):
                base = engine.matches(compared)
            if with_divergence:
                total += engine.matches(replace(compared, against=base))
        sums = torch.stack(
            [torch.stack([seen.update[name], seen.output[name], seen.input[name]]) for name in seen.update]
        )
        dist.all_reduce(sums)
        nats, tokens = dist.numbers(dist.all_reduce(total))
        energies = dict(zip(seen.update, sums, strict=True))
        grams = _summed(seen.grams)
        found.append(Effect(text.name, text.weight, energies, nats / tokens if with_divergence else None, grams))
    return found


def _summed(grams: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Module → C over all ranks: in one sum, for a model has hundreds of modules and each C is a few kilobytes."""
    if not grams:
        return {}
    return dict(zip(grams, dist.all_reduce(torch.stack(list(grams.values()))), strict=True))


def measure_frozen_a(
    engine: Engine, texts: Sequence[CalibrationTexts], *, batch_size: int, device: torch.device
) -> None:
    """Gives adapters whose A is frozen but was drawn, not calibrated, what the calibration pass gives the others.

    C = A G Aᵀ and tr(W G Wᵀ) of every source, probe and of the mixture come from one forward pass over the texts: no
    Gram of the inputs is made, which would be d_in² numbers a group. Collective; the base's function alone counts, so
    it may be called whatever B is. Same bits on every rank; on another number of ranks sums are rounded otherwise.

    Raises:
        Preempted: a rank was asked to stop.
    """
    effects = measure(engine, texts, batch_size=batch_size, device=device, with_divergence=False, with_grams=True)
    mixed = mixture(effects)
    for name, module in adapted_linears(engine.model).items():
        grams = {effect.name: effect.grams[name] for effect in effects}
        parts = [share(e, e.energies[name]) * e.grams[name] for e in effects if e.weight is not None]
        grams[MIXTURE] = torch.stack(parts).sum(0)
        module.update_grams = {of: gram.float() for of, gram in grams.items()}
        module.references = {effect.name: float(effect.energies[name][1]) for effect in effects}
        module.references[MIXTURE] = float(mixed[name][1])


def even_batches(batches: list[Batch], *, device: torch.device) -> list[Batch]:
    """This rank's text batches, filled up so that every rank runs the same number through a sharded model."""
    most = dist.all_reduce_max(torch.tensor([len(batches)], device=device))
    return batches + [filler(0)] * (int(most) - len(batches))


def mixture(effects: Sequence[Effect]) -> dict[str, Tensor]:
    """Module → the sources' energies, (3,) float64: each source by its weight over the energy of its inputs.

    As its Gram counts in docs/methods.md §1d. A source whose inputs are all zero adds nothing.
    """
    mixed: dict[str, Tensor] = {}
    for effect in effects:
        if effect.weight is not None:
            for module, energies in effect.energies.items():
                part = share(effect, energies) * energies
                mixed[module] = mixed[module] + part if module in mixed else part
    return mixed


def share(effect: Effect, energies: Tensor) -> Tensor:
    """What a source's sums are multiplied by in the mixture: its weight over Σ‖x‖² of a module."""
    assert effect.weight is not None
    return effect.weight / energies[2].clamp_min(SMALLEST)


def interference(effects: Sequence[Effect]) -> dict[str, dict[str, Tensor]]:
    """Source, probe, ``calibration`` (the mixture) → module → ‖ΔW X‖_F/‖W X‖_F, () float64 (docs/methods.md §1c, §1d).

    A module whose W X is zero has none, as the output projections of a block that was added to a base: it is left out.
    For adapters whose A trained or whose calibration did not keep A G Aᵀ; the delta form with frozen A knows the same
    number from r × r matrices.
    """
    by_name = {effect.name: effect.energies for effect in effects} | {MIXTURE: mixture(effects)}
    return {
        name: {module: (update / output).sqrt() for module, (update, output, _) in energies.items() if output > 0}
        for name, energies in by_name.items()
    }


def divergence(effects: Sequence[Effect]) -> dict[str, float]:
    """Source or probe → mean KL(base ‖ adapted) in nats; under ``calibration`` that of the sources by their weights."""
    found = {effect.name: effect.divergence for effect in effects if effect.divergence is not None}
    weights = {effect.name: effect.weight for effect in effects if effect.weight is not None and effect.name in found}
    if weights:
        found[MIXTURE] = sum(weight * found[name] for name, weight in weights.items()) / sum(weights.values())
    return found


def final_interference(
    engine: Engine, data: TrainingData, effects: Sequence[Effect], *, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """``interference`` of the adapter in the engine: from r × r matrices where A is frozen (docs/methods.md §1c).

    The small Grams are of all tokens that were calibrated on; a forward pass rounds every activation.
    """
    modules = adapted_linears(engine.model).values()
    if not all(module.update_grams for module in modules):
        return interference(effects)
    for module in modules:
        module.measure = True
    engine.matches(data.micro_batches(0, rank=dist.rank(), world_size=dist.world_size())[0].to(device))
    for module in modules:
        module.measure = False
    return live_interference(engine)


def live_interference(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """name → module → (), what the last forward pass with ``measure`` set left on the adapted linears.

    Without the modules that ``interference`` leaves out.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for module, adapted in adapted_linears(engine.model).items():
        for name, value in adapted.interference.items():
            found.setdefault(name, {})[module] = value
    return found


def summarise(
    found: Mapping[str, Mapping[str, Tensor]],
    texts: Sequence[CalibrationTexts],
    divergence: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """``max``, ``mean``, ``rms`` and ``per_module`` of the mixture; ``by_source``, ``by_probe`` with the first three.

    Where ``divergence`` is given, each of them has its ``divergence`` too. None where no module has an interference.
    """

    def ends(name: str) -> dict[str, float | None]:
        ends: dict[str, float | None] = dict.fromkeys(("max", "mean", "rms"))
        if values := list(found.get(name, {}).values()):
            stacked = torch.stack(values).double()
            rms = stacked.square().mean().sqrt()
            ends = {"max": float(stacked.max()), "mean": float(stacked.mean()), "rms": float(rms)}
        return ends if divergence is None else ends | {"divergence": divergence[name]}

    return {
        **ends(MIXTURE),
        "per_module": {module: float(value) for module, value in found.get(MIXTURE, {}).items()},
        "by_source": {text.name: ends(text.name) for text in texts if text.weight is not None},
        "by_probe": {text.name: ends(text.name) for text in texts if text.weight is None},
    }
