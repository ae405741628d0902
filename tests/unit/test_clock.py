"""Each phase of a run is told with its own time and the most memory that it held, whatever came before it."""

import os

import pytest
import torch

from nslora_dist import machine
from nslora_dist.clock import Clock

LARGE = 128 * 2**20


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system keeps one peak for a process")
def test_every_phase_has_its_own_peak() -> None:
    clock = Clock()
    with clock.phase("calibration"):
        held = bytearray(os.urandom(1) * LARGE)  # touched, or no memory would be behind it
        del held
    with clock.phase("training", "plain LoRA"):
        pass
    with clock.phase("training", "null space"):
        pass
    small, large = clock.peaks["training"], clock.peaks["calibration"]
    assert large - small > 0.8 * LARGE
    assert clock.highest >= large and list(clock.seconds) == ["calibration", "training"]


def test_what_is_left_is_less_for_each_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "host_memory", lambda: (12e9, 1e9))
    assert machine.room(torch.device("cpu"), ranks=4) == 3e9
    monkeypatch.setattr(machine, "host_memory", lambda: None)
    assert machine.room(torch.device("cpu"), ranks=4) == 0
