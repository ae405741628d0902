"""The stages of a run one by one, so that a test can look between them; called on every rank."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nslora_dist import dist
from nslora_dist.adapter import adapted_linears
from nslora_dist.base_model import FrozenLinear
from nslora_dist.calibration import store
from nslora_dist.calibration.store import NullSpace
from nslora_dist.data import Batch, TrainingData
from nslora_dist.engines import Engine, start_engine
from nslora_dist.pipeline import Run, export
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

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.run.recipe

    def train(self) -> Trained:
        """The whole training."""
        with Scalars(self.run.folder / "tensorboard") as scalars:
            return train(self.engine, self.data, self.recipe.train, device=self.run.device, scalars=scalars)

    def interference(self) -> dict[str, dict[str, Tensor]]:
        """name → module → ‖ΔW X‖ / ‖W X‖ as the pipeline reports it at the end."""
        return self.run._interference(self.engine, self.data, self.recipe)

    def export(self, folder: Path) -> Path:
        """Writes the adapter as the pipeline does at the end."""
        report: dict[str, Any] = {
            "leak": None,
            "interference_by_arm": {"arm": None},
            "evaluation": {"base": {}, "arm": {}},
        }
        export(self.engine, self.recipe, folder, report, texts=self.run.texts, evaluated="arm")
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
    space = None
    if recipe.adapter.method == "lora_null":
        space = run.null_space() if null_space is None else null_space_of(null_space)
    data = TrainingData.load(recipe.data, recipe.train, run.tokenizer)
    engine = start_engine(run._job(recipe, space), recipe)
    try:
        yield Stage(run, engine, data)
    finally:
        engine.close()


def direct_interference(
    stage: Stage, base: nn.Module, sequences: Sequence[Tensor]
) -> dict[str, tuple[float, float]]:
    """module → (‖ΔW X‖², ‖W X‖²) in float64 on a plain Hugging Face base, sequence by sequence, ΔW formed densely."""
    base = base.double()
    factors = {}
    for name, module in adapted_linears(stage.engine.model).items():
        gather = stage.engine.gather
        a, b = gather(module.lora_A).double(), gather(module.lora_B).double()
        update = b @ a
        if module.start_B is not None:
            a0 = a if module.start_A is None else gather(module.start_A).double()
            update = update - gather(module.start_B).double() @ a0
        factors[name] = module.scale * update
    return dense_energies(base, factors, sequences)


@torch.no_grad()
def dense_energies(
    base: nn.Module, updates: dict[str, Tensor], sequences: Sequence[Tensor]
) -> dict[str, tuple[float, float]]:
    """module → (‖ΔW X‖², ‖W X‖²) over the sequences' tokens."""
    sums = {name: [0.0, 0.0] for name in updates}
    hooks = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].flatten(0, 1)
            sums[name][0] += float((x @ updates[name].T).square().sum())
            sums[name][1] += float((x @ module.weight.T).square().sum())

        return hook

    for name in updates:
        hooks.append(base.get_submodule(name).register_forward_hook(watch(name)))
    for ids in sequences:
        base(input_ids=ids[None])
    for hook in hooks:
        hook.remove()
    return {name: (update, output) for name, (update, output) in sums.items()}
