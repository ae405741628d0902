"""Collectives in a process group that somebody else made, with NCCL alone."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor

from nslora_dist import dist


class Stub:
    """Two ranks with the same values, and what was sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *devices: str) -> None:
        self.sent: list[Tensor] = []
        group = SimpleNamespace(_device_types=[torch.device(name) for name in devices])
        monkeypatch.setattr(torch_dist.distributed_c10d, "_get_default_group", lambda: group)
        monkeypatch.setattr(dist, "world_size", lambda: 2)
        monkeypatch.setattr(dist, "_current_gpu", lambda: torch.device("cpu"))
        for name in ("all_reduce", "reduce", "broadcast"):
            monkeypatch.setattr(torch_dist, name, self._double)

    def _double(self, tensor: Tensor, **_: Any) -> SimpleNamespace:
        self.sent.append(tensor.mul_(2))
        return SimpleNamespace(wait=lambda: None)


CALLS: list[Callable[[Tensor], object]] = [
    dist.all_reduce,
    dist.broadcast,
    lambda tensor: dist.start_reduce_to(tensor, owner=0),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("devices", "copied"), [(["cuda"], True), (["cuda", "cpu"], False), (["cpu"], False)])
def test_a_tensor_on_the_cpu_goes_by_the_gpu_where_nothing_else_can_send_it(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Tensor], object], devices: list[str], copied: bool
) -> None:
    stub = Stub(monkeypatch, *devices)
    tensor = torch.tensor([1.0, 3.0], dtype=torch.float64)
    work = call(tensor)
    (sent,) = stub.sent
    assert (sent is tensor) != copied and torch.equal(tensor, torch.tensor([2.0, 6.0], dtype=torch.float64))
    if copied:
        assert work is None or work is tensor  # nothing is left to wait for


def test_a_tensor_on_a_gpu_is_sent_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub(monkeypatch, "cuda")
    tensor = torch.empty(2, device="meta")
    dist.all_reduce(tensor)
    assert stub.sent[0] is tensor


def test_the_default_group_of_this_project_sends_from_the_cpu() -> None:
    with dist.process_group():
        assert torch.device("cpu") in torch_dist.distributed_c10d._get_default_group()._device_types
