"""Calibration runs on a group of ranks, and a dense float64 reference written from docs/methods.md alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers.grams import whole_model_grams
from helpers.stages import CPU, started
from helpers.world import make_recipe, zero_config
from nslora_dist import dist, pipeline
from nslora_dist.base_config import load_config
from nslora_dist.base_model import build_empty
from nslora_dist.calibration.store import ModuleStart
from nslora_dist.calibration_data import CalibrationTexts, text_batches
from nslora_dist.effects import even_batches
from nslora_dist.errors import UserError
from nslora_dist.input_groups import input_groups
from nslora_dist.pipeline import Run


@dataclass(frozen=True)
class Calibrated:
    """A null space as one rank sees it.

    Attributes:
        manifest: of the artifact.
        tensors: of the artifact; on rank 0 alone.
        starts: what every module starts from; on every rank.
        texts: what was calibrated on.
    """

    manifest: dict[str, Any]
    tensors: dict[str, Tensor]
    starts: dict[str, ModuleStart]
    texts: list[CalibrationTexts]


def calibrate(world: Path, cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Calibrated]:
    """case → its null space, for every case's base and recipe changes."""
    found = {}
    for name, (base, changes) in cases.items():
        run = Run(make_recipe(world, world / base, world / f"{dist.world_size()}" / name, **changes), CPU)
        space = run.null_space()
        starts = dict(space.starts(space.manifest["modules"], device=CPU))
        found[name] = Calibrated(space.manifest, dict(space.tensors), starts, run.texts)
    return found


def live_grams(world: Path, base: str, engine: str) -> tuple[dict[str, tuple[Tensor, dict[str, float]]], Any]:
    """group → (Gram, Σ‖Wx‖² by module) of source ``a`` through a sharded, trained model's plain forward passes."""
    settings = {"name": engine, "config": str(zero_config(world)) if engine == "zero3" else None}
    changes: dict[str, Any] = {"engine": settings, "adapter": {"method": "lora"}, "train": {"max_steps": 1}}
    recipe = make_recipe(world, world / base, world / f"live_{engine}", **changes)
    groups = input_groups(build_empty(recipe.base_model, load_config(recipe.base_model)))
    with started(recipe) as stage:
        sequences = stage.run.texts[0].calibration
        # Sixteen to a batch: one rank has a batch more than the other, which must run along and count nothing.
        mine = text_batches(sequences[:17], batch_size=8, rank=dist.rank(), world_size=dist.world_size())
        batches = even_batches(mine, device=CPU)
        assert dist.rank() == 0 or batches[-1].token_count == 0
        sums = whole_model_grams(stage.engine.model, stage.engine.matches, groups, batches)
        found = {}
        for group in groups:
            gram, energies = sums[group.name]
            outputs = {name: float(dist.all_reduce(energy)) for name, energy in energies.items()}
            found[group.name] = dist.all_reduce(gram), outputs
        return found, sequences[:17]


def refused(world: Path, bases: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The message that ended the calibration of each base, with these recipe changes."""
    said = {}
    for base, changes in bases.items():
        recipe = make_recipe(world, world / base, world / f"refused_{base}", **changes)
        try:
            Run(recipe, CPU).null_space()
            said[base] = "no error"
        except UserError as error:
            said[base] = str(error)
    return said


def used_again(world: Path) -> dict[str, str]:
    """What the second, third and fourth run in a folder did."""
    recipe = make_recipe(world, world / "llama", world / "again")
    first = Run(recipe, CPU).null_space()
    folder = world / "again" / "null_space"
    file = folder / "null_space.safetensors"
    said = {}
    kept = pipeline.Calibration

    class Recalibrates(Exception):
        pass

    def calibration(*args: Any, **kwargs: Any) -> None:
        raise Recalibrates

    pipeline.Calibration = calibration  # type: ignore[assignment, misc]

    def attempt(**changes: Any) -> str:
        try:
            again = Run(make_recipe(world, world / "llama", world / "again", **changes), CPU).null_space()
        except Recalibrates:
            return "calibrates"
        except UserError as error:
            return f"refuses: {error}"
        assert {**again.manifest, "files": None} == {**first.manifest, "files": None}
        assert again.tensors.keys() == first.tensors.keys()
        assert all(torch.equal(again.tensors[name], value) for name, value in first.tensors.items())
        return "uses it again"

    said["same"] = attempt()
    said["another engine, batch and rate"] = attempt(
        engine={"name": "fsdp2"}, calibration={"batch_size": 2}, train={"learning_rate": 1.0}
    )
    said["another seed"] = attempt(calibration={"seed": 1})
    said["another rank"] = attempt(adapter={"rank": 7})
    said["another dtype"] = attempt(base_model={"dtype": "bfloat16"})
    _on_main(lambda: (world / "a.jsonl").write_text((world / "a.jsonl").read_text().replace("w1 ", "w2 ")))
    said["other texts"] = attempt()
    pipeline.Calibration = kept  # type: ignore[misc]
    second = Run(recipe, CPU).null_space()
    said["key"] = "new" if second.manifest["key"] != first.manifest["key"] else "old"

    def damage() -> None:
        data = bytearray(file.read_bytes())
        data[-5] ^= 0x40
        file.write_bytes(data)

    _on_main(damage)
    damaged = file.read_bytes()
    said["damaged"] = attempt()
    assert file.read_bytes() == damaged, "the only copy was written over"
    return said


def _on_main(change: Any) -> None:
    dist.barrier()
    if dist.is_main():
        change()
    dist.barrier()


@torch.no_grad()
def activations(base: Path, sequences: Sequence[Tensor], modules: Sequence[str]) -> dict[str, Tensor]:
    """module → X (d_in, tokens) in float64, every sequence alone, on a plain Hugging Face model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    columns: dict[str, list[Tensor]] = {name: [] for name in modules}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            columns[name].append(args[0][0].T)

        return hook

    for name in modules:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    for ids in sequences:
        model(input_ids=ids[None])
    return {name: torch.cat(parts, dim=1) for name, parts in columns.items()}


def weights(base: Path, modules: Sequence[str]) -> dict[str, Tensor]:
    """module → W in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return {name: model.get_submodule(name).weight.detach() for name in modules}


@dataclass(frozen=True)
class Reference:
    """Dense float64 results for one group. ``grams``: by source and probe, and ``calibration`` for the mixture."""

    grams: dict[str, Tensor]
    heldout: dict[str, Tensor]


def reference_grams(
    base: Path, texts: Sequence[CalibrationTexts], groups: dict[str, list[str]]
) -> dict[str, Reference]:
    """Group → its Grams, G = X Xᵀ, mixed as docs/methods.md §1d says: G = Σ w_s G_s / tr(G_s) · mean tr, Σ w_s = 1."""
    heads = [modules[0] for modules in groups.values()]
    made = {}
    seen = {t.name: activations(base, t.calibration, heads) for t in texts}
    held = {t.name: activations(base, t.heldout, heads) for t in texts if t.heldout}
    whole = sum(t.weight for t in texts if t.weight is not None)
    for group, modules in groups.items():
        grams = {name: x[modules[0]] @ x[modules[0]].T for name, x in seen.items()}
        traces = {t.name: grams[t.name].trace() for t in texts if t.weight is not None}
        mean = sum(traces.values()) / len(traces)
        mixture = [t.weight / whole * mean / traces[t.name] * grams[t.name] for t in texts if t.weight is not None]
        grams["calibration"] = torch.stack(mixture).sum(0)
        made[group] = Reference(grams, {name: x[modules[0]] @ x[modules[0]].T for name, x in held.items()})
    return made
