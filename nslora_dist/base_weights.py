"""The base's weights, from safetensors onto every rank, one unit at a time.

A rank reads, casts and packs its share of the rows of every tensor, and the ranks exchange what came of it: the file is
read once by all of them together, 4-bit weights travel in 4 bits, and quantising is shared out as well.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from nslora_dist import dist
from nslora_dist.adapter import Adapter
from nslora_dist.base_files import BaseFiles
from nslora_dist.frozen import FrozenLinear

PIECE_BYTES = 4 * 2**20
"""Read at a time: a copy out of the mapped file, beside the tensor it goes to."""


@torch.no_grad()
def fill_unit(unit: nn.Module, name: str, checkpoint: BaseFiles, *, device: torch.device) -> None:
    """Gives one unit's base parameters their values on ``device``, 4-bit ones packed; adapters are left alone.

    A parameter that is a DTensor already, sharded by rows, is given this rank's; no other rank reads or sends them.

    Collective: every rank calls it for the same units in the same order.

    Raises:
        UserError: a tensor is missing, unreadable or of another shape; on every rank.
    """
    modules = list(_base_modules(unit, name))
    # What can be wrong with a checkpoint is found before the ranks wait for each other: opening a file checks its size.
    with dist.together(f"loading {name}"):
        for path, module in modules:
            for key, shape, _ in _wanted(module):
                checkpoint.check(f"{path}.{key}", shape)
    for path, module in modules:
        whole: dict[str, tuple[Tensor, ...]] = {}
        for key, shape, dtype in _wanted(module):
            read = functools.partial(checkpoint.read, f"{path}.{key}", shape, dtype=dtype, device=device)
            held: Any = getattr(module, key)
            if isinstance(held, DTensor):  # sharded by rows before it was filled
                local: Tensor = held.to_local()
                _read_rows(read, dist.rows_of(shape[0]), local)
            elif isinstance(module, FrozenLinear) and key == "weight" and module.quantized:
                mine = module.pack(read(rows=dist.rows_of(shape[0])))
                whole[key] = tuple(dist.gather_rows(part, count=shape[0]) for part in mine)
            else:
                whole[key] = (_exchanged(read, shape, dtype=dtype, device=device),)
        return_freed_memory()  # pieces that were read, packed and exchanged
        if isinstance(module, FrozenLinear):
            module.fill(whole["weight"], whole["bias"][0] if "bias" in whole else None)
            continue
        for key, (value,) in whole.items():
            setattr(module, key, nn.Parameter(value, requires_grad=False))


def _exchanged(
    read: Callable[..., Tensor], shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A whole tensor of which each rank reads its rows, in pieces, straight to where they belong."""
    if dist.world_size() == 1:
        return read()
    whole = dist.rows_buffer(shape, dtype=dtype, device=device)
    rows = dist.rows_of(shape[0])
    _read_rows(read, rows, whole[rows])
    return dist.complete_rows(whole, count=shape[0])


def _read_rows(read: Callable[..., Tensor], rows: slice, target: Tensor) -> None:
    """Reads some rows into ``target``, a few at a time."""
    assert len(target) == rows.stop - rows.start, f"{len(target)} rows of room for {rows}"
    step = max(1, PIECE_BYTES // (4 * prod(target.shape[1:])))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        target[start - rows.start : stop - rows.start] = read(rows=slice(start, stop))


def _wanted(module: nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """A module's own parameters as the checkpoint has them: name, shape and the dtype to cast to."""
    found = [(key, tuple(old.shape), old.dtype) for key, old in module.named_parameters(recurse=False)]
    if isinstance(module, FrozenLinear):  # whose weight may be held packed
        found[0] = ("weight", (module.out_features, module.in_features), module.dtype)
    return found


def _base_modules(unit: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The unit's modules by their names in the checkpoint, which knows nothing of adapters."""
    for path, module in unit.named_modules():
        full = f"{name}.{path}" if path else name
        if isinstance(module, Adapter):
            continue
        yield full.removesuffix(".base"), module


def empty_unit(unit: nn.Module) -> None:
    """Puts a unit's parameters back on the meta device."""
    for module in unit.modules():
        for key, old in list(module.named_parameters(recurse=False)):
            empty = nn.Parameter(torch.empty_like(old, device="meta"), requires_grad=old.requires_grad)
            setattr(module, key, empty)
        if isinstance(module, FrozenLinear):
            module.quant_state = None


def fill_rotary(model: PreTrainedModel, *, device: torch.device) -> None:
    """Computes the rotary frequencies on the device: buffers that no checkpoint holds."""
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)


def finish(model: PreTrainedModel, *, device: torch.device) -> None:
    """Gives a filled model what no unit holds: rotary frequencies, and a tied head."""
    fill_rotary(model, device=device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def return_freed_memory() -> None:
    """Gives host memory that was freed back to the system, where the C library is one that would keep it for later.

    glibc raises its threshold for doing so itself up to 32 MB, which is what a unit's weights are made of.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
