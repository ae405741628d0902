"""Trainings under an interference budget, each step's B gathered and measured anew; called on every rank."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.resume_run import checkpoints_of, recipe_of
from helpers.stages import started
from helpers.world import zero_config
from nslora_dist import dist
from nslora_dist.adapter import adapted_linears
from nslora_dist.budget import Budget
from nslora_dist.calibration.store import MIXTURE
from nslora_dist.data import Batch
from nslora_dist.effects import interference
from nslora_dist.engines import Engine
from nslora_dist.report import Scalars
from nslora_dist.trainer import train

STEPS, SAVED = 4, 2
CLIPPED = 0.02
"""Below the norm of every step's gradient."""
OFFLOAD = Path(__file__).parents[2] / "ds_configs" / "zero3_offload.json"
BATCHES = {"epochs": None, "global_batch_size": 12, "micro_batch_size": 2}


@dataclass
class Budgeted:
    """What a training came to.

    Attributes:
        losses: one a step.
        norms: of the gradients before clipping.
        dense: by step, module → interference after it, from the gathered B.
        factors: every B at the end.
        live: module → what the forward pass makes of it at the end.
        seen: module → the same by ‖ΔW x‖ and ‖W x‖ of every token of the calibration texts.
        facts: what the report is told.
    """

    losses: list[float | None]
    norms: list[float | None]
    dense: list[dict[str, float]]
    factors: dict[str, Tensor]
    live: dict[str, float]
    seen: dict[str, float]
    facts: dict[str, Any] | None = None


def train_each(layout: str, world: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Budgeted]:
    """Every case once, with a null space that ``single-1`` left; ``from_X`` goes on from a checkpoint of case ``X``.

    Args:
        layout: engine and ranks.
        world: base and texts.
        cases: name → settings laid over the recipe.
    """
    return {name: _train(layout, world, name, changes) for name, changes in cases.items()}


def _train(layout: str, world: Path, name: str, changes: dict[str, Any]) -> Budgeted:
    folder = world / layout / name
    given = world / "single-1" / ("bfloat16" if name == "bfloat16" else "none")
    with dist.together("preparing"):
        if dist.is_main():
            zero_config(world)
            if given != folder:
                shutil.copytree(given / "null_space", folder / "null_space")
            if name.startswith("from_"):
                start = f"checkpoints/step-{SAVED}"
                shutil.copytree(world / layout / name.removeprefix("from_") / start, folder / start)
    settings: dict[str, Any] = {
        "adapter": {"method": "lora_null", "rank": 5, "alpha": 7.5},
        "train": {"max_steps": STEPS, "max_grad_norm": CLIPPED} | BATCHES,
        "checkpoint": {"every": SAVED, "keep_last": 9},
    }
    settings |= engine_of(layout)
    for section, values in changes.items():
        settings[section] = settings.get(section, {}) | values
    recipe = recipe_of(layout, world, folder, settings)
    with started(recipe) as stage:
        dense: list[dict[str, float]] = []
        deal = stage.data.micro_batches

        def micro_batches(step: int, *, rank: int, world_size: int) -> list[Batch]:
            dense.append(measured(stage.engine))  # what the steps before have left to this one
            return deal(step, rank=rank, world_size=world_size)

        stage.data.micro_batches = micro_batches  # type: ignore[method-assign]
        checkpoints = checkpoints_of(stage, folder)
        checkpoints.look()
        budget = Budget.of(stage.engine, recipe, stage.run.texts, device=stage.run.device)
        with Scalars(folder / "tensorboard", start=checkpoints.step) as scalars:
            trained = train(
                stage.engine,
                stage.data,
                recipe.train,
                device=stage.run.device,
                scalars=scalars,
                checkpoints=checkpoints,
                budget=budget,
            )
        stage.data.micro_batches = deal  # type: ignore[method-assign]
        return Budgeted(
            losses=trained.losses,
            norms=trained.grad_norms,
            dense=[*dense[1:], measured(stage.engine)],
            factors={n: stage.engine.gather(m.lora_B) for n, m in adapted_linears(stage.engine.model).items()},
            live={n: float(value) for n, value in stage.interference()[MIXTURE].items()},
            seen={n: float(value) for n, value in interference(stage.effects(batch_size=4))[MIXTURE].items()},
            facts=None if budget is None else budget.facts(),
        )


def engine_of(layout: str) -> dict[str, Any]:
    """Where it is not the layout's own.

    ZeRO-3 on three ranks cuts rows of rank 5 in two; here with its defaults, which keep small parameters whole.
    ``zero3_offload-2`` has the optimizer's state and the parameters in host memory, by the shipped configuration.
    """
    config = {"zero3-3": None, "zero3_offload-2": str(OFFLOAD)}
    return {"engine": {"name": "zero3", "config": config[layout]}} if layout in config else {}


def measured(engine: Engine) -> dict[str, float]:
    """Module → interference with the mixture, from the whole B, dense and in float64."""
    found = {}
    for name, module in adapted_linears(engine.model).items():
        b = module.scale * engine.gather(module.lora_B).double()
        energy = (b @ module.update_grams[MIXTURE].double() @ b.T).trace()
        found[name] = math.sqrt(float(energy) / module.references[MIXTURE])
    return found


def scale_and_look(layout: str, world: Path) -> dict[str, bool]:
    """``Engine.scale`` by two on one module: the master of it alone, its moments not, the forward's copy too."""
    changes = {
        "base_model": {"dtype": "bfloat16"},
        "adapter": {"method": "lora", "rank": 5},
        "train": {"max_steps": 1} | BATCHES,
    }
    with dist.together("preparing"):
        if dist.is_main():
            zero_config(world)
    recipe = recipe_of(layout, world, world / layout / "scaled", changes | engine_of(layout))
    with started(recipe) as stage:
        stage.train()
        target, *_, other = adapted_linears(stage.engine.model)
        before = {shard.name: {k: v.clone() for k, v in shard.values.items()} for shard in stage.engine.shards()}
        seen: list[Tensor] = []
        module = adapted_linears(stage.engine.model)[target]
        low_rank = module.low_rank

        def watched(dtype: torch.dtype) -> Any:
            seen.append(low_rank(dtype).b.detach().clone())
            return low_rank(dtype)

        module.low_rank = watched  # type: ignore[method-assign]
        batch = stage.data.micro_batches(0, rank=dist.rank(), world_size=dist.world_size())[0]
        stage.engine.matches(batch)
        stage.engine.scale({f"{target}.lora_B": 2.0})
        stage.engine.matches(batch)
        after = {shard.name: shard.values for shard in stage.engine.shards()}
        light = {shard.name: shard.values for shard in stage.engine.shards(moments=False)}
        names = list(reversed(after))
        masters = dict(zip(names, stage.engine.masters(names), strict=True))

        def same(name: str, key: str, factor: float = 1.0) -> bool:
            return torch.equal(after[name][key], factor * before[name][key])

        mine, kept = f"{target}.lora_B", [name for name in after if name != f"{target}.lora_B"]
        return {
            "something was trained": bool(seen[0].any()) and f"{other}.lora_B" in kept,
            "master": same(mine, "value", 2.0),
            "moments": same(mine, "exp_avg") and same(mine, "exp_avg_sq"),
            "others": all(same(name, key) for name in kept for key in before[name]),
            "forward": torch.equal(seen[1], 2 * seen[0]),
            "light": all(
                v.keys() == {"value"} and torch.equal(v["value"], after[n]["value"]) for n, v in light.items()
            ),
            "masters": all(torch.equal(v.view(-1), after[n]["value"]) for n, v in masters.items()),
        }
