"""Ranks that torchrun starts again meet in the store in which those before them met; and ranks that do not meet."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as torch_dist

from nslora_dist.errors import RankLost
from nslora_dist.meeting import _of_this_start, join


def start(store: torch_dist.Store, world: int) -> list[torch_dist.Store]:
    """What every rank of one start finds."""
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: _of_this_start(store, rank, world, 60.0), range(world)))


def test_restarted_ranks_find_nothing_of_those_before() -> None:
    store = torch_dist.HashStore()
    for world in (3, 3, 2, 4):  # machines come and go
        parts = start(store, world)
        assert not any(part.check(["address"]) for part in parts)
        parts[0].set("address", str(world))
        assert [part.get("address") for part in parts] == [str(world).encode()] * world


def test_a_rank_that_never_comes() -> None:
    store = torch_dist.HashStore()
    start(store, 2)  # whoever came then does not count
    with pytest.raises(RuntimeError, match="1 of them came within 0 s"):
        _of_this_start(store, 0, 2, 0.1)
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(RuntimeError):
        _of_this_start(store, 1, 2, 0.1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "[enforce fail at /x/gloo/transport/tcp/pair.cc:1] Gloo connectFullMesh failed\nmore",
            r"rank 1: the 2 ranks met at head:29500 and cannot reach each other \(.* failed\); name the network "
            "interface between the machines in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
        ),
        ("wait timeout after 5000ms", r"rank 1: the 2 ranks did not meet at head:29500 \(wait timeout"),
    ],
)
def test_ranks_that_cannot_reach_each_other(monkeypatch: pytest.MonkeyPatch, fault: str, said: str) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError(fault)

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch_dist, "rendezvous", lambda *_, **__: iter([(torch_dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(torch_dist, "init_process_group", fails)
    with pytest.raises(RankLost, match=said):
        join(torch.device("cpu"), 5.0)
