"""4-bit bytes travel as bfloat16 or float32 numbers: whatever they spell there, they arrive as they left."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.parity_run import ENGINES, packed_bytes
from helpers.ranks import run_ranks
from helpers.stages import as_bytes, quantise
from helpers.world import change_weights

# bitsandbytes' NF4 levels, by code.
NEGATIVE = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004)
POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
LEVELS = torch.tensor([*NEGATIVE, 0.0, *POSITIVE])


def nan_patterns(dtype: torch.dtype, count: int) -> Tensor:
    """(bytes,) uint8 that spell NaNs of the dtype, little endian: quiet and signalling, both signs, many payloads."""
    dice = torch.Generator().manual_seed(0)
    payload = torch.randint(1, 2**7 if dtype == torch.bfloat16 else 2**23, (count,), generator=dice)
    sign = torch.randint(0, 2, (count,), generator=dice)
    if dtype == torch.bfloat16:
        bits = (sign << 15) | (0xFF << 7) | payload
        return torch.stack([bits & 0xFF, bits >> 8], 1).flatten().to(torch.uint8)
    bits = (sign << 31) | (0xFF << 23) | payload
    return torch.stack([(bits >> shift) & 0xFF for shift in (0, 8, 16, 24)], 1).flatten().to(torch.uint8)


def weight_of(packed: Tensor, shape: torch.Size) -> Tensor:
    """A weight that NF4 packs into just these bytes: the level of each code, in blocks that all reach ±1."""
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    return (0.05 * LEVELS[codes]).reshape(shape)


def poison(tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, value in tensors.items():
        if "_proj.weight" in name:
            # Every other number a NaN; a NaN's high byte 0x7f or 0xff brings the code 15, level 1, to every block.
            packed = nan_patterns(dtype, value.numel() // 2 // dtype.itemsize).view(-1, dtype.itemsize)
            packed[1::2] = torch.randint(0, 256, packed[1::2].shape, dtype=torch.uint8)
            tensors[name] = weight_of(packed.flatten(), value.shape).contiguous()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_survive_sharding(world: Path, tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    for name in ("task.jsonl", "a.jsonl", "b.jsonl", "p.jsonl"):
        (tmp_path / name).write_bytes((world / name).read_bytes())
    base = change_weights(world / "llama", tmp_path / "adversarial", lambda tensors: poison(tensors, kind))
    weights = {k: v for k, v in load_file(base / "model.safetensors").items() if "_proj.weight" in k}
    alone = {}
    nans, payloads = 0, set()
    for name, weight in weights.items():
        packed, _ = quantise(weight.to(kind), kind)
        alone[name.removesuffix(".weight")] = as_bytes(packed)
        bad = packed[packed.isnan()]
        nans += len(bad)
        payloads |= set(bad.view(torch.int16 if kind == torch.bfloat16 else torch.int32).tolist())
    share = nans / sum(w.numel() // 2 // kind.itemsize for w in weights.values())
    assert share > 0.45 and len(payloads) > 200, f"{share:.0%} NaNs with {len(payloads)} patterns"

    for engine in ENGINES:
        for rank, found in enumerate(run_ranks(packed_bytes, ENGINES[engine], engine, tmp_path, dtype)):
            assert found.keys() == alone.keys()
            for name, expected in alone.items():
                mine = found[name]
                assert torch.equal(mine.gathered, expected), f"{engine} rank {rank} at rest: {name}"
                # Accumulation: 4 micro-batches on one rank, 2 on two; block 0 takes no gradient to its first input.
                passes = 4 // ENGINES[engine]
                assert len(mine.forward) == passes and len(mine.backward) in (
                    (0, passes) if ".0." in name else (passes,)
                )
                for when in ("forward", "backward"):
                    for seen in getattr(mine, when):
                        assert torch.equal(seen, expected), f"{engine} rank {rank} {when} {name}"
