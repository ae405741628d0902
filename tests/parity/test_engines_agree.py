"""Single, ZeRO-3 on two ranks and FSDP2 on two ranks train the same adapter, and touch nothing frozen."""

import math
from typing import Any

import pytest
import torch

from helpers.parity_run import CASES
from helpers.stages import CPU
from nslora_dist.calibration import store

SHARDED = ("zero3", "fsdp2")
FLOAT32 = [name for name, case in CASES.items() if case.changes["base_model"].get("dtype") != "bfloat16"]
BFLOAT16 = [name for name in CASES if name not in FLOAT32]

Results = dict[str, dict[str, Any]]


@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.parametrize("case", FLOAT32)
def test_float32_losses(found: Results, engine: str, case: str) -> None:
    reference, losses = found["single"][case].losses, found[engine][case].losses
    assert len(losses) == CASES[case].steps
    assert losses == pytest.approx(reference, rel=1e-5)
    assert found[engine][case].norms == pytest.approx(found["single"][case].norms, rel=1e-3)


@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.parametrize("case", BFLOAT16)
def test_bfloat16_losses(found: Results, engine: str, case: str) -> None:
    """bfloat16 has 8 bits: one unit is 0.4%. A row's own values are the same on every engine, but gradients of
    different micro-batches are rounded before they are summed, and AdamW amplifies that in coordinates near zero."""
    assert found[engine][case].losses == pytest.approx(found["single"][case].losses, rel=5e-3)


def test_training_is_not_trivial(found: Results) -> None:
    """Clipping is active at some steps, the schedule moves, the loss falls: agreement above means something."""
    delta = found["single"]["delta"]
    assert max(delta.norms) > 0.06 * 1.2, "train.max_grad_norm 0.06 hardly clipped"
    losses, without_decay = delta.losses, found["single"]["delta_no_decay"].losses
    assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 0.04
    assert losses != pytest.approx(without_decay, rel=1e-5), "weight decay did nothing"


@pytest.mark.parametrize("engine", ["single", *SHARDED])
def test_v2_is_the_delta_form(found: Results, engine: str) -> None:
    """docs/methods.md §1a: the same function and the same gradient, at alpha 12 and rank 8.

    The delta case recomputes activations in the backward pass, the residual one keeps them: that too changes nothing.
    """
    assert found[engine]["v2"].losses == pytest.approx(found[engine]["delta_no_decay"].losses, rel=1e-5)
    assert len(found[engine]["v2"].losses) == 20


@pytest.mark.parametrize("engine", ["single", *SHARDED])
def test_v1_trains_a(found: Results, engine: str) -> None:
    v1 = found[engine]["v1"]
    assert all(math.isfinite(loss) for loss in v1.losses) and v1.losses[-1] != v1.losses[0]
    assert all(not torch.equal(parts["A"], parts["A0"]) for parts in v1.factors.values())
    assert v1.losses[-1] != pytest.approx(found[engine]["v2"].losses[5], rel=1e-6)


@pytest.mark.parametrize("engine", ["single", *SHARDED])
@pytest.mark.parametrize("case", CASES)
def test_frozen_tensors_keep_their_bits(found: Results, engine: str, case: str) -> None:
    mine = found[engine][case]
    assert mine.changed == []
    frozen_a = [name for name in mine.before if name.endswith(("lora_A", "start_A", "start_B"))]
    adapter = CASES[case].changes["adapter"]
    per_module = 0 if "method" in adapter else 2 if adapter.get("form") == "residual" else 1
    assert len(frozen_a) == 14 * per_module
    reference = found["single"][case].before
    base = [name for name in mine.before if name not in frozen_a]
    assert set(base) == {name for name in reference if name not in frozen_a} and len(base) > 14
    for name in base:
        assert mine.before[name].numel() and torch.equal(mine.before[name], reference[name]), name


@pytest.mark.parametrize("engine", ["single", *SHARDED])
def test_start_is_the_null_space_on_disk(found: Results, world: Any, engine: str) -> None:
    """A is frozen at A₀ and B₀ at its own value, gathered from the shards in the order they were dealt."""
    space = store.load(world / "single" / "v2" / "null_space")
    starts = dict(space.starts(found[engine]["v2"].factors, device=CPU))
    for name, parts in found[engine]["v2"].factors.items():
        start = starts[name]
        assert torch.equal(parts["A"], start.a) and torch.equal(parts["B0"], start.b)
        assert not torch.equal(parts["B"], start.b)
    for name, parts in found[engine]["v1"].factors.items():
        start = starts[name]
        assert torch.equal(parts["A0"], start.a) and torch.equal(parts["B0"], start.b)


@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.parametrize("case", FLOAT32)
def test_adapters_agree(found: Results, engine: str, case: str) -> None:
    """Not the losses alone: the trained factors.

    AdamW's first steps are the sign of the gradient, so a coordinate whose gradient is rounding may go either way; all
    others agree, and such are few.
    """
    for name, parts in found[engine][case].factors.items():
        for key, value in parts.items():
            reference = found["single"][case].factors[name][key]
            assert value.dtype == reference.dtype == torch.float32
            difference = (value - reference).norm() / reference.norm()
            assert difference < 1e-3, f"{name}.{key}"
