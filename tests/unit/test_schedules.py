"""The learning rate of every step, against values worked out by hand."""

import pytest
from test_data_tools import train_section

from nslora_dist.trainer import learning_rate

WARMUP = [0.25, 0.5, 0.75, 1.0]
"""Of the peak: a warm-up of 0.4 of 10 steps is 4, the last of them at the peak; step 4 begins the decay."""
DECAY = {
    "constant": [1.0] * 6,
    "linear": [1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
    # Half of 1 + cos of 0°, 30°, 60°, 90°, 120° and 150°.
    "cosine": [1.0, (1 + 3**0.5 / 2) / 2, 0.75, 0.5, 0.25, (1 - 3**0.5 / 2) / 2],
}


@pytest.mark.parametrize("schedule", DECAY)
def test_warm_up_then_decay(schedule: str) -> None:
    train = train_section(schedule=schedule, warmup_ratio=0.4, learning_rate=2.0)
    found = [learning_rate(step, total=10, train=train) for step in range(10)]
    assert found == pytest.approx([2.0 * share for share in WARMUP + DECAY[schedule]], rel=1e-12)


@pytest.mark.parametrize("schedule", DECAY)
def test_without_a_warm_up_the_first_step_is_at_the_peak(schedule: str) -> None:
    train = train_section(schedule=schedule, warmup_ratio=0.0, learning_rate=2.0)
    assert learning_rate(0, total=3, train=train) == 2.0
    assert learning_rate(0, total=1, train=train) == 2.0


def test_a_part_of_a_step_warms_up_a_whole_one() -> None:
    train = train_section(warmup_ratio=0.21, learning_rate=3.0)
    found = [learning_rate(step, total=10, train=train) for step in range(4)]
    assert found[:3] == pytest.approx([1.0, 2.0, 3.0]) and found[3] == pytest.approx(3.0)
