"""Null-space compression on two ranks, whole and sharded, takes the steps of one; errors end every rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.merge_world import make_adapter, make_model, recipe, write_inputs
from helpers.ranks import run_ranks
from helpers.stages import started
from helpers.world import make_recipe, make_texts, zero_config
from nslora_dist import dist
from nslora_dist.calibration_data import text_batches
from nslora_dist.effects import even_batches
from nslora_dist.errors import UserError
from nslora_dist.export import read_adapter
from nslora_dist.merge import run_merge
from nslora_dist.merge_recipe import MergeRecipe
from nslora_dist.merging.inputs import read_inputs
from nslora_dist.merging.model import load_merged
from nslora_dist.merging.nsc import NscResult, optimise
from nslora_dist.merging.tasks import read_tasks
from nslora_dist.update_grams import collect_update_grams

CPU = torch.device("cpu")
NSC = {"steps": 5, "learning_rate": 0.02, "batch_size": 3, "target_fraction": 0.5}
"""Three inputs a step: one rank has two of them, the other one; the last of seven stands alone in a profile's batch."""


def job(folder: Path, family: str, target: str, **changes: Any) -> MergeRecipe:
    adapters = {name: folder / family / name for name in "ab"}
    inputs = write_inputs(folder / family, family) if not dist.world_size() > 1 or dist.is_main() else None
    inputs = dist.share(inputs)  # type: ignore[assignment]
    return recipe(folder / family / "base", adapters, folder / target, method="nsc", nsc=NSC, inputs=inputs, **changes)


def searched(folder: Path, cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, NscResult]:
    """Case → what its search found on this rank."""
    found = {}
    for name, (family, base) in cases.items():
        made = job(folder, family, "unused", base_model=base)
        assert made.base_model is not None and made.nsc is not None
        tasks = read_tasks(made)
        model = load_merged(made.base_model, tasks, granularity="module", initial=[0.4, 0.3], device=CPU)
        inputs = read_inputs(made.inputs, made.base_model, seed=0)
        found[name] = optimise(model, ["a", "b"], inputs, made.nsc, device=CPU)
    return found


def collected(folder: Path, engine: str) -> dict[str, Tensor]:
    """C of every module after a little training, from this rank's share of the task's texts."""
    settings = {"name": engine, "config": str(zero_config(folder)) if engine == "zero3" else None}
    changes: dict[str, Any] = {"engine": settings, "adapter": {"method": "lora"}, "train": {"max_steps": 3}}
    with started(
        make_recipe(folder, folder / "llama/base", folder / f"{engine}{dist.world_size()}", **changes)
    ) as stage:
        stage.train()
        texts = stage.run.texts[0].calibration[:17]
        mine = text_batches(texts, batch_size=8, rank=dist.rank(), world_size=dist.world_size())
        return collect_update_grams(
            stage.engine.model, even_batches(mine, device=CPU), stage.engine.matches, device=CPU
        )


def whole_merge(folder: Path, family: str, target: str) -> str:
    try:
        run_merge(job(folder, family, target), CPU)
    except UserError as error:
        return str(error)
    return "done"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for family in ("llama", "bert"):
        base = make_model(folder / family / "base", family)
        make_adapter(folder / family / "a", base, family, seed=1, r=3, use_rslora=True)
        make_adapter(folder / family / "b", base, family, seed=2, r=5)
    return folder


def test_two_ranks_take_the_steps_of_one(world: Path) -> None:
    plain = {"llama": ("llama", {}), "bert": ("bert", {}), "nf4": ("llama", {"quantization": "nf4"})}
    sharded = {name: ("llama", {"shard": True, **plain[name][1]}) for name in ("llama", "nf4")}
    (one,) = run_ranks(searched, 1, world, plain)
    first, second = run_ranks(searched, 2, world, plain | {f"{k}_sharded": v for k, v in sharded.items()})
    for name, found in first.items():
        wanted = one[name.removesuffix("_sharded")]
        assert found == second[name], f"{name}: ranks disagree"
        assert found.losses == pytest.approx(wanted.losses, rel=1e-5), name
        assert found.unmoved == wanted.unmoved
        for row, values in wanted.coefficients.items():
            assert found.coefficients[row] == pytest.approx(values, abs=2e-5), f"{name} {row}"
        for task, blocks in wanted.profile.items():
            for block, means in blocks.items():
                assert found.profile[task][block] == pytest.approx(means, rel=1e-5), f"{name} {task} {block}"
        assert max(abs(values[0] - 0.4) for values in wanted.coefficients.values()) > 0.02


def test_whole_merge_on_two_ranks(world: Path) -> None:
    assert run_ranks(whole_merge, 1, world, "bert", "alone") == ["done"]
    assert run_ranks(whole_merge, 2, world, "bert", "together") == ["done", "done"]
    alone, _ = read_adapter(world / "alone/adapter")
    together, _ = read_adapter(world / "together/adapter")
    for name, pair in alone.items():
        torch.testing.assert_close(together[name].lora_b, pair.lora_b, atol=1e-6, rtol=1e-3)
    first, second = run_ranks(whole_merge, 2, world, "bert", "together")
    assert first == second and "exists already" in first


def test_update_grams_of_sharded_engines(world: Path) -> None:
    """Two ranks with two batches and one, the parameters sharded, give the sums of one rank."""
    make_texts(world)
    (single,) = run_ranks(collected, 1, world, "single")
    for engine in ("fsdp2", "zero3"):
        first, second = run_ranks(collected, 2, world, engine)
        assert first.keys() == single.keys()
        for name, gram in single.items():
            assert torch.equal(first[name], second[name])
            assert (first[name] - gram).norm() < 1e-3 * gram.norm(), f"{engine} {name}"
            assert float(gram.trace()) > 0
