"""The stages of a run one by one, so that a test can look between them; called on every rank."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from nslora_dist import dist
from nslora_dist.arm_job import Arm
from nslora_dist.budget import Budget
from nslora_dist.calibration import store
from nslora_dist.calibration.store import NullSpace
from nslora_dist.calibration.weights import WeightNullSpace
from nslora_dist.data import Batch, TrainingData
from nslora_dist.effects import Effect, final_interference, measure
from nslora_dist.engines import Engine, start_engine
from nslora_dist.export_arm import export
from nslora_dist.frozen import FrozenLinear
from nslora_dist.pipeline import Run
from nslora_dist.recipe import Recipe
from nslora_dist.report import Scalars
from nslora_dist.trainer import Trained, train

CPU = torch.device("cpu")


@dataclass
class Stage:
    """A run with its engine started."""

    run: Run
    engine: Engine
    data: TrainingData
    null_space: NullSpace | WeightNullSpace | None = None

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.run.recipe

    def train(self) -> Trained:
        """The whole training."""
        with Scalars(self.run.folder / "tensorboard") as scalars:
            budget = Budget.of(self.engine, self.recipe, self.run.texts, device=self.run.device)
            here = {"device": self.run.device, "scalars": scalars, "budget": budget}
            return train(self.engine, self.data, self.recipe.train, **here)

    def effects(self, *, batch_size: int) -> list[Effect]:
        """What the adapter does to every source and probe."""
        return measure(self.engine, self.run.texts, batch_size=batch_size, device=self.run.device)

    def interference(self, effects: Sequence[Effect] = ()) -> dict[str, dict[str, Tensor]]:
        """name → module → ‖ΔW X‖ / ‖W X‖ as an arm reports it at the end; ``effects`` are for an A that trained."""
        return final_interference(self.engine, self.data, effects, device=self.run.device)

    def export(self, folder: Path) -> Path:
        """Writes the adapter as the pipeline does at the end."""
        report: dict[str, Any] = {
            "leak": None,
            "interference_by_arm": {"arm": None},
            "evaluation": {"base": {}, "arm": {}},
        }
        space = self.null_space
        arm = Arm("arm", self.recipe, space, self.data)
        export(self.engine, arm, folder, report, texts=self.run.texts, base="base", device=self.run.device)
        return folder

    def logits(self, ids: Tensor) -> Tensor:
        """(b, s) tokens → (b, s - 1, vocabulary) as the engine's own forward pass makes them."""
        found: list[Tensor] = []
        hook = self.engine.model.lm_head.register_forward_hook(lambda module, args, output: found.append(output))
        self.engine.matches(Batch(ids, None, None, ids.clone()).to(self.run.device))
        hook.remove()
        return found[0].detach().float().cpu().unflatten(0, (ids.shape[0], ids.shape[1] - 1))

    def frozen(self) -> dict[str, Tensor]:
        """Every parameter without gradient, whole, viewed as bytes; names as in ``engine.model``."""
        parameters = self.engine.model.named_parameters()
        return {name: as_bytes(self.engine.gather(p)) for name, p in parameters if not p.requires_grad}


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, (n,) uint8: equality of floats would call a NaN different and -0.0 the same."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).clone()


def quantised_layers(engine: Engine) -> dict[str, FrozenLinear]:
    """The 4-bit linears by their names in the Hugging Face model."""
    modules: Iterator[tuple[str, nn.Module]] = engine.model.named_modules()
    return {n.removesuffix(".base"): m for n, m in modules if isinstance(m, FrozenLinear) and m.quantized}


def null_space_of(folder: Path) -> NullSpace:
    """A null space that another run left, whatever its key."""
    if dist.is_main():
        return store.load(folder)
    return NullSpace(manifest=store.load(folder).manifest, tensors={})


@contextlib.contextmanager
def started(recipe: Recipe, *, null_space: Path | None = None, device: torch.device = CPU) -> Iterator[Stage]:
    """Calibrates (or takes the null space of another run), loads and shards; closes the engine at the end."""
    run = Run(recipe, device)
    space: NullSpace | WeightNullSpace | None = run.weight_null_space(recipe)
    if recipe.adapter.method == "lora_null":
        space = run.null_space() if null_space is None else null_space_of(null_space)
    data = TrainingData.load(recipe.data, recipe.train, run.tokenizer)
    engine = start_engine(run.job(recipe, space), recipe)
    try:
        yield Stage(run, engine, data, space)
    finally:
        engine.close()


@dataclass
class Energies:
    """Σ over tokens of ‖ΔW x‖², ‖W x‖² and ‖x‖² of one module."""

    update: float = 0.0
    output: float = 0.0
    input: float = 0.0


@torch.no_grad()
def dense_energies(base: nn.Module, updates: dict[str, Tensor], sequences: Sequence[Tensor]) -> dict[str, Energies]:
    """Energies of every module in ``updates`` (name → dense ΔW) on a plain model's own activations.

    Each sequence goes through alone, so there is no padding to leave out.
    """
    sums = {name: Energies() for name in updates}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].flatten(0, 1)
            sums[name].update += float((x @ updates[name].T).square().sum())
            sums[name].output += float((x @ module.weight.T).square().sum())
            sums[name].input += float(x.square().sum())

        return hook

    hooks = [base.get_submodule(name).register_forward_hook(watch(name)) for name in updates]
    for ids in sequences:
        base(input_ids=ids[None])
    for hook in hooks:
        hook.remove()
    return sums


@torch.no_grad()
def dense_divergence(base: nn.Module, updates: dict[str, Tensor], sequences: Sequence[Tensor]) -> float:
    """Mean over all tokens of KL(base ‖ base with the updates added to its weights), each sequence alone."""
    before = [base(input_ids=ids[None]).logits.log_softmax(-1) for ids in sequences]
    weights = {name: base.get_submodule(name).weight for name in updates}
    for name, update in updates.items():
        weights[name].data += update
    after = [base(input_ids=ids[None]).logits.log_softmax(-1) for ids in sequences]
    for name, update in updates.items():
        weights[name].data -= update
    total = sum(float((b.exp() * (b - a)).sum()) for b, a in zip(before, after, strict=True))
    return total / sum(len(ids) for ids in sequences)


def plain_base(folder: Path, *, dtype: str, quantised: bool = False) -> PreTrainedModel:
    """Hugging Face's own model of the base in ``dtype``; with ``quantised``, its blocks' linears rounded to NF4.

    The rounding is bitsandbytes' own, there and back, layer by layer, and the result dense.
    """
    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    if quantised:
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                packed, state = quantise(module.weight.data, kind)
                module.weight.data = bitsandbytes.functional.dequantize_4bit(packed, state)
    return model


def quantise(weight: Tensor, storage: torch.dtype) -> tuple[Tensor, Any]:
    """NF4 with double quantisation in blocks of 64, packed into ``storage``."""
    return bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4", quant_storage=storage
    )
