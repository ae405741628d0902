"""The plan of what the sharded model measures with the calibration texts, against what toy runs send and allocate."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import world
from helpers.counted import Allocations, Counts, as_counts, counting, wide_toy, within
from helpers.ranks import run_ranks
from nslora_dist import machine
from nslora_dist.plan import traffic, zero3
from nslora_dist.plan.cluster import Cluster
from nslora_dist.plan.measuring import measuring, measuring_memory, pass_traffic
from nslora_dist.plan.shapes import shapes_of
from nslora_dist.recipe import Recipe

DIAL = {"method": "lora", "freeze_a": True, "rank": 5, "interference_budget": 1e-3, "budget_over": "total"}
WRITTEN = 3
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp2": ("fsdp2", {}),
    "fsdp2, nf4": ("fsdp2", {"base_model": {"quantization": "nf4"}}),
    "fsdp2, dial on a random A": ("fsdp2", {"adapter": DIAL}),
    "zero3": ("zero3", {}),
    "zero3, dial on a random A": ("zero3", {"adapter": DIAL}),
}


def measured_traffic(recipe: Recipe) -> dict[str, Counts]:
    """Three steps and what is measured before, in and after them, each with its counts; of the steps the last."""
    from helpers.stages import CPU, started
    from nslora_dist import dist
    from nslora_dist.budget import Budget
    from nslora_dist.scoring import continuations

    found: dict[str, Counts] = {}
    with started(recipe) as stage, counting() as counter:
        engine = stage.engine

        def trained(step: int) -> Counts:
            for batch in stage.data.micro_batches(step, rank=dist.rank(), world_size=dist.world_size()):
                engine.backward(engine.forward(batch))
            engine.step(1e-2)
            return counter.take()

        engine.matches(stage.data.micro_batches(0, rank=dist.rank(), world_size=dist.world_size())[0])
        counter.take()  # what the first forward pass gathers to keep
        budget = Budget.of(engine, recipe, stage.run.texts, device=CPU)
        found["before"] = counter.take()
        for step in range(3):
            found["trained"] = trained(step)
            kept = None if budget is None else budget.enforce()
            found["budget"] = counter.take()
        assert kept is None or kept.factors, "nothing was scaled"
        (batch, *_) = stage.data.micro_batches(0, rank=dist.rank(), world_size=dist.world_size())
        engine.matches(batch)
        counter.take()  # what the last step has left is gone now
        stage.effects(batch_size=recipe.calibration.batch_size)
        found["after"] = counter.take()
        engine.matches(batch)
        found["question"] = counter.take()
        asked: dict[str, Any] = {"batch_size": 1, "pad": 0, "device": CPU, "name": "answers"}
        continuations(engine, [[1, 2], [3]], ends=lambda new: False, most=WRITTEN, **asked)
        found["answers"] = counter.take()
        room = machine.ROOM
        for case, share in (("kept", room), ("no room", 0.0)):
            machine.ROOM = share
            with engine.whole():
                continuations(engine, [[1, 2], [3]], ends=lambda new: False, most=WRITTEN, **asked)
                engine.matches(batch)
            found[case] = counter.take()
        machine.ROOM = room
        engine.matches(batch)
        found["let go"] = counter.take()
        trained(1)  # finds what the last pass has left gathered
        found["trained again"] = trained(2)
        found["ended"] = ended_by(engine, batch)
    return found


def ended_by(engine: Any, batch: Any) -> str:
    """What comes out of an evaluation with kept weights of which a module runs out of memory."""

    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    engine.model.lm_head.forward = full
    try:
        with engine.whole():
            engine.matches(batch)
    except Exception as error:
        return type(error).__name__
    finally:
        del engine.model.lm_head.forward
    return "nothing"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_traffic(tmp_path: Path, case: str, ranks: int) -> None:
    name, changes = CASES[case]
    if ranks == 3 and "dial" not in case:
        pytest.skip("three ranks divide no B of rank 5 between its rows")
    config = world.zero_config(tmp_path)
    engine = {"name": name} | ({"config": str(config)} if name == "zero3" else {})
    world.make_texts(tmp_path)
    changes = changes | {"engine": engine, "train": {"global_batch_size": 2 * ranks}, "calibration": {"samples": 13}}
    recipe = world.make_recipe(tmp_path, world.make_base(tmp_path / "base"), tmp_path / "out", **changes)
    shapes, knobs = shapes_of(recipe), zero3.Knobs.of(json.loads(config.read_text()))
    found = run_ranks(measured_traffic, ranks, recipe)
    phase = measuring(recipe, shapes, Cluster(gpus=ranks), knobs)
    for counted in found:
        sums = {name: counted["before"].get(name, (0, 0)) for name in ("all_gather", "all_reduce")}
        for kind, (calls, size) in counted["after"].items():
            sums[kind] = sums[kind][0] + calls, sums[kind][1] + size
        assert sums == as_counts(list(phase.wire))
        dial = recipe.adapter.interference_budget is not None
        _, one = pass_traffic(recipe, shapes, ranks, knobs)
        assert counted["question"] == as_counts(one)
        assert counted["answers"] == as_counts(traffic.times(one, WRITTEN)), "each token gathers every weight"
        once = counted["kept"].pop("all_gather")
        assert once[1] == as_counts(one)["all_gather"][1] and not counted["kept"], "every weight once"
        assert name == "zero3" or once == as_counts(one)["all_gather"], "DeepSpeed gathers them one by one"
        assert counted["no room"] == as_counts(traffic.times(one, WRITTEN + 1))
        assert counted["let go"] == as_counts(one)
        assert counted["trained again"] == counted["trained"]
        assert counted["ended"] == "MemoryError", "and nothing that came of it"
        assert counted["budget"] == (as_counts(traffic.budget(shapes, ranks, name)) if dial else {})
    if name == "zero3" and ranks == 3:
        assert traffic.budget(shapes, ranks, name)[0].calls == 2, "no row was split"


def measured_memory(recipe: Recipe) -> int:
    """What measuring allocates at its highest, beside the model."""
    from helpers.stages import started

    with started(recipe) as stage:
        size = recipe.calibration.batch_size
        stage.effects(batch_size=size)
        with Allocations(0) as allocated:
            stage.effects(batch_size=size)
    return allocated.peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory(tmp_path: Path, dtype: str) -> None:
    recipe = wide_toy(tmp_path, {"base_model": {"dtype": dtype}}, {"name": "single"})
    (peak,) = run_ranks(measured_memory, 1, recipe)
    shapes = shapes_of(recipe)
    parts, _ = measuring_memory(recipe, shapes, Cluster(gpus=1), zero3.Knobs())
    planned = parts["activations"] + parts["the base's hidden states"]
    if dtype == "bfloat16":  # a CPU's norm widens a copy of the update, of 4 bytes for the 2 that the scale has cost
        planned += 2 * recipe.calibration.batch_size * recipe.calibration.sequence_length * shapes.intermediate
    assert within(planned, peak, 0.1)
