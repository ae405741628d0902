"""Trainings that leave checkpoints and go on from those of other engines and numbers of ranks; runs on every rank."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.stages import Stage, started
from helpers.world import make_recipe, zero_config
from nslora_dist import dist, watch
from nslora_dist.adapter import adapted_linears
from nslora_dist.budget import Budget
from nslora_dist.checkpoint import Checkpoints, identity
from nslora_dist.data import Batch, TrainingData
from nslora_dist.engines import Engine
from nslora_dist.errors import UserError
from nslora_dist.report import Scalars
from nslora_dist.trainer import Trained, train

STEPS = 5
"""One epoch of the toy task's 70 rows by 16, the last global batch short."""


@dataclass
class Resumed:
    """What a training came to.

    Attributes:
        trained: its curve.
        factors: trained parameters by name, whole.
        seen: step → the samples that this rank saw in it, of the steps that this process did.
        history: who trained from where to where.
    """

    trained: Trained
    factors: dict[str, Tensor]
    seen: dict[int, list[int]]
    history: list[dict[str, Any]]


def recipe_of(layout: str, world: Path, output: Path, changes: dict[str, Any]) -> Any:
    """The recipe of ``engine-ranks`` with A and B trained at a rank that divides by no number of ranks."""
    engine: dict[str, Any] = {"name": layout.split("-")[0]}
    if engine["name"] == "zero3":
        engine["config"] = str(world / "zero.json")
    settings = {
        "adapter": {"method": "lora", "rank": 5},
        "train": {
            "max_steps": None,
            "epochs": 1.0,
            "schedule": "linear",
            "global_batch_size": 16,
            "micro_batch_size": 4,
        },
        "engine": engine,
        "checkpoint": {"every": 2, "keep_last": 9},
    }
    for section, values in changes.items():
        settings[section] = settings.get(section, {}) | values if isinstance(values, dict) else values
    return make_recipe(
        world, world / changes.get("base", "llama"), output, **{k: v for k, v in settings.items() if k != "base"}
    )


def checkpoints_of(stage: Stage, folder: Path) -> Checkpoints:
    """The checkpoints of a stage's training in a run folder."""
    return Checkpoints(
        folder / "checkpoints",
        stage.recipe.checkpoint,
        belongs_to=identity(stage.recipe, {"base": "b", "rows": stage.data.hash, "null_space": None}),
        engine=stage.recipe.engine.name,
    )


def resume(layout: str, world: Path, name: str, start: Path | None, changes: dict[str, Any]) -> Resumed:
    """Trains to the end in ``world/name``, from the beginning or from a copy of the checkpoint ``start``."""
    folder = world / name
    with dist.together("preparing"):
        if dist.is_main():
            zero_config(world)
            if start is not None:
                shutil.copytree(start, folder / "checkpoints" / start.name)
    recipe = recipe_of(layout, world, folder, changes)
    seen: dict[int, list[int]] = {}
    with started(recipe) as stage:
        _record(stage.data, seen)
        checkpoints = checkpoints_of(stage, folder)
        checkpoints.look()
        with Scalars(folder / "tensorboard", start=checkpoints.step) as scalars:
            trained = train(
                stage.engine,
                stage.data,
                recipe.train,
                device=stage.run.device,
                scalars=scalars,
                checkpoints=checkpoints,
                budget=Budget.of(stage.engine, recipe, stage.run.texts, device=stage.run.device),
            )
        factors = _factors(stage.engine)
    return Resumed(trained, factors, seen, checkpoints.history)


def _record(data: TrainingData, seen: dict[int, list[int]]) -> None:
    deal = data.micro_batches

    def micro_batches(step: int, *, rank: int, world_size: int) -> list[Batch]:
        batches = deal(step, rank=rank, world_size=world_size)
        seen[step] = [sample for batch in batches for row in batch.samples for sample in row]
        return batches

    data.micro_batches = micro_batches  # type: ignore[method-assign]


def resume_each(layout: str, world: Path, starts: dict[str, Path], changes: dict[str, Any]) -> dict[str, Resumed]:
    """From each of several checkpoints, in one group of ranks."""
    return {name: resume(layout, world, f"{layout}/from_{name}", start, changes) for name, start in starts.items()}


def whole(layout: str, world: Path, changes: dict[str, Any], name: str = "whole") -> Resumed:
    """The uninterrupted training."""
    return resume(layout, world, f"{layout}/{name}", None, changes)


def same(one: Resumed, other: Resumed) -> bool:
    """Whether two trainings came to the same bits: curve and factors."""
    curves = (one.trained.losses, one.trained.grad_norms) == (other.trained.losses, other.trained.grad_norms)
    return curves and all(torch.equal(value, other.factors[name]) for name, value in one.factors.items())


def skipping(layout: str, world: Path, name: str, bad: dict[int, str], changes: dict[str, Any]) -> dict[str, Any]:
    """A training in which the steps ``bad`` meet a loss or a gradient that is not finite; its end and what it left.

    ``loss`` spoils the loss that a rank sees, ``gradient`` the gradient alone, both on the last rank only; ``stop``
    asks for an end there.
    """
    folder = world / name
    with dist.together("preparing"):
        if dist.is_main():
            zero_config(world)
    recipe = recipe_of(layout, world, folder, changes)
    here = {"step": -1}
    with started(recipe) as stage:
        last = dist.rank() == dist.world_size() - 1
        deal, forward, backward = stage.data.micro_batches, stage.engine.forward, stage.engine.backward

        def micro_batches(step: int, *, rank: int, world_size: int) -> list[Batch]:
            here["step"] = step
            if bad.get(step) == "stop":
                watch.ask_stop("SIGTERM")
            return deal(step, rank=rank, world_size=world_size)

        def spoilt_forward(batch: Batch) -> Tensor:
            loss = forward(batch)
            return loss * torch.nan if last and bad.get(here["step"]) == "loss" else loss

        def spoilt_backward(loss: Tensor) -> None:
            backward(loss * torch.inf if last and bad.get(here["step"]) == "gradient" else loss)

        stage.data.micro_batches = micro_batches  # type: ignore[method-assign]
        stage.engine.forward, stage.engine.backward = spoilt_forward, spoilt_backward  # type: ignore[method-assign]
        checkpoints = checkpoints_of(stage, folder)
        checkpoints.look()
        trained, said, snapshots = None, "", {}
        step = stage.engine.step

        def kept_step(rate: float) -> float:
            before = _factors(stage.engine)
            norm = step(rate)
            snapshots[here["step"]] = all(torch.equal(v, before[k]) for k, v in _factors(stage.engine).items())
            return norm

        stage.engine.step = kept_step  # type: ignore[method-assign]
        try:
            with Scalars(folder / "tensorboard") as scalars:
                trained = train(
                    stage.engine,
                    stage.data,
                    recipe.train,
                    device=stage.run.device,
                    scalars=scalars,
                    checkpoints=checkpoints,
                )
        except UserError as error:
            said = str(error)
        factors = _factors(stage.engine)
    finite = all(bool(value.isfinite().all()) for value in factors.values())
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return {"trained": trained, "said": said, "unchanged": snapshots, "finite": finite, "left": left}


def _factors(engine: Engine) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": engine.gather(getattr(module, key))
        for name, module in adapted_linears(engine.model).items()
        for key in ("lora_A", "lora_B")
    }
