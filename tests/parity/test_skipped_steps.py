"""A step whose loss or gradient is not finite changes nothing, is counted, and ends the run when it is one too many."""

from pathlib import Path

import pytest

from helpers.parity_run import ENGINES
from helpers.ranks import run_ranks
from helpers.resume_run import STEPS, skipping
from helpers.world import make_base, make_texts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_texts(tmp_path_factory.mktemp("skipped"))
    make_base(folder / "llama")
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_skipped_and_counted(world: Path, engine: str) -> None:
    """Two kinds of bad steps, with accumulation; the loss before and after them is that of other engines."""
    layout, ranks = f"{engine}-{ENGINES[engine]}", ENGINES[engine]
    bad = {1: "gradient", 3: "loss", 4: "loss"}
    found = run_ranks(skipping, ranks, layout, world, f"{engine}_counted", bad, {"train": {"micro_batch_size": 1}})
    first = found[0]
    trained = first["trained"]
    assert first["said"] == ""
    assert trained.skipped == [1, 3, 4] and trained.updates == STEPS - 3
    assert [loss is None for loss in trained.losses] == [step in (3, 4) for step in range(STEPS)]
    assert [norm is None for norm in trained.grad_norms] == [step in bad for step in range(STEPS)]
    # The gradient's step reached the engine and was dropped there; those of the loss never did.
    assert first["unchanged"] == {step: step == 1 for step in range(STEPS) if step not in (3, 4)}
    assert first["finite"]
    for other in found[1:]:
        assert (other["trained"].losses, other["trained"].skipped) == (trained.losses, trained.skipped)
    if engine != "single":
        single = run_ranks(skipping, 1, "single-1", world, f"{engine}_as_single", bad, {})[0]["trained"]
        ours, theirs = ([loss or 0.0 for loss in one.losses] for one in (trained, single))
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert trained.updates == single.updates


@pytest.mark.parametrize("engine", ENGINES)
def test_stops_at_the_last_good_checkpoint(world: Path, engine: str) -> None:
    """Step 2's checkpoint is on its way when step 3 fails: what it holds is not known to be good."""
    layout, ranks = f"{engine}-{ENGINES[engine]}", ENGINES[engine]
    bad = {2: "loss", 3: "gradient", 4: "loss"}
    changes = {"checkpoint": {"every": 1, "keep_last": 9}}
    first, *others = run_ranks(skipping, ranks, layout, world, f"{engine}_stops", bad, changes)
    assert first["trained"] is None and first["finite"]
    assert "step 3 and the 2 after it: the loss is not finite" in first["said"]
    assert first["said"].endswith(f"the last good state is {world / f'{engine}_stops' / 'checkpoints' / 'step-1'}")
    assert first["left"] == ["step-1"]
    assert all(other["said"] == first["said"] for other in others)


def test_a_checkpoint_put_off_is_made_up_for(world: Path) -> None:
    changes = {"checkpoint": {"every": 2, "keep_last": 9}}
    found = run_ranks(skipping, 2, "fsdp2-2", world, "put_off", {2: "loss"}, changes)[0]
    assert found["left"] == ["step-4", "step-5"], "step 2 was dropped, 4 is on time"
    found = run_ranks(skipping, 2, "fsdp2-2", world, "made_up", {3: "loss"}, {"checkpoint": {"every": 3}})[0]
    assert found["left"] == ["step-5"]


def test_what_stops_behind_a_skipped_step_is_not_lost(world: Path) -> None:
    """Whether that state is good is not known yet: it is kept, and so are the older ones."""
    changes = {"checkpoint": {"every": None, "keep_last": 1}}
    whole = run_ranks(skipping, 2, "fsdp2-2", world, "not_stopped", {3: "loss"}, changes)[0]["trained"]
    first = run_ranks(skipping, 2, "fsdp2-2", world, "stopped", {3: "loss", 4: "stop"}, changes)[0]
    assert first["said"].endswith(f"continues from {world / 'stopped' / 'checkpoints' / 'step-4'}")
    assert first["left"] == ["step-4"]
    then = run_ranks(skipping, 2, "fsdp2-2", world, "stopped", {}, changes)[0]["trained"]
    assert (then.losses, then.skipped, then.updates) == (whole.losses, whole.skipped, whole.updates)
    changes = {"checkpoint": {"every": 2, "keep_last": 1}, "train": {"stop_after_skipped": 2}}
    again = run_ranks(skipping, 2, "fsdp2-2", world, "older", {3: "loss", 4: "stop"}, changes)[0]
    assert again["left"] == ["step-2", "step-4"]
    ended = run_ranks(skipping, 2, "fsdp2-2", world, "older", {4: "loss"}, changes)[0]
    assert ended["said"].endswith("step-4 was written among them: move it away to go on from an older one")
