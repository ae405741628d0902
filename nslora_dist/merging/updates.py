"""Updates of one module as streams of rows, for what is too large to hold: ΔW is only ever seen some rows at a time."""

import functools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nslora_dist.errors import UserError
from nslora_dist.export import Factors
from nslora_dist.merging.factors import compress, frobenius

BLOCK_VALUES = 2**22
"""Values of ΔW in memory at once, per task: 16 MiB of float32."""
OVERSAMPLING = 10
POWER_STEPS = 3


class Update(Protocol):
    """The update of one module, row block by row block; every pass gives the same values."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        ...

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First row and (rows, d_in) float32, from the top down."""
        ...


def row_spans(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """First and last row of each block; they depend on the shape alone, and with them what chance decides."""
    rows = max(1, BLOCK_VALUES // shape[1])
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


@dataclass(frozen=True)
class LowRankUpdate:
    """B A."""

    factors: Factors

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.factors.lora_b.shape[0], self.factors.lora_a.shape[1]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """See ``Update``."""
        for start, stop in row_spans(self.shape):
            yield start, self.factors.lora_b[start:stop] @ self.factors.lora_a


@dataclass(frozen=True)
class SparseUpdate:
    """TIES or DARE-TIES of one module (docs/methods.md §4; TIES arXiv 2306.01708, DARE arXiv 2311.03099).

    Every task's ΔW_k is thinned out: ``ties`` keeps its ``density`` share of the largest entries, ``dare_ties`` keeps
    each with that probability and divides it by it. Entry by entry the sign with the larger Σ λ_k ΔW_k is elected, and
    the mean of the kept λ_k ΔW_k of that sign is the result.

    Attributes:
        tasks: names, which decide with ``seed`` and ``module`` what chance drops.
        pairs: the tasks' factors, the scale in B.
        coefficients: λ_k.
    """

    module: str
    tasks: Sequence[str]
    pairs: Sequence[Factors]
    coefficients: Sequence[float]
    density: float
    by_chance: bool
    seed: int

    def __post_init__(self) -> None:
        if not len(self.tasks) == len(self.pairs) == len(self.coefficients):
            raise ValueError(
                f"{self.module}: {len(self.tasks)} tasks, {len(self.pairs)} updates, {len(self.coefficients)} "
                "coefficients: give one of each a task"
            )
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density {self.density} is outside (0, 1]: it is the share of entries that stay")

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return LowRankUpdate(self.pairs[0]).shape

    @functools.cached_property
    def thresholds(self) -> list[tuple[int, int]]:
        """``threshold`` of every task, searched once for all passes."""
        keep = max(1, int(self.density * self.shape[0] * self.shape[1]))
        return [threshold(LowRankUpdate(pair), keep) for pair in self.pairs]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """See ``Update``."""
        trims = [None] * len(self.pairs) if self.by_chance else [Trim(*found) for found in self.thresholds]
        streams = [LowRankUpdate(pair).blocks() for pair in self.pairs]
        for parts in zip(*streams, strict=True):
            start = parts[0][0]
            kept = []
            for task, trim, coefficient, (_, block) in zip(self.tasks, trims, self.coefficients, parts, strict=True):
                if trim is None:
                    mask = chance_mask(block.shape, self.density, f"{self.seed}/{task}/{self.module}/{start}")
                    block = block * mask.to(block.device) / self.density
                else:
                    block = block * trim.mask(block)
                kept.append(coefficient * block)
            yield start, elect(kept)


def elect(parts: Sequence[Tensor]) -> Tensor:
    """Entry by entry: the mean over those that are not zero and have the sign of the sum."""
    sign = torch.stack(list(parts)).sum(0).sign()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for part in parts:
        agrees = (part.sign() == sign) & (sign != 0)
        total += part * agrees
        count += agrees
    return total / count.clamp_min(1)


def chance_mask(shape: torch.Size | tuple[int, ...], density: float, seed: str) -> Tensor:
    """Bool on the CPU, each entry true with probability ``density``; the same for the same seed anywhere."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return torch.rand(shape, generator=generator) < density


def threshold(update: Update, keep: int) -> tuple[int, int]:
    """The ``keep``-th largest magnitude, found in two passes of bounded memory.

    The bits of a positive float32 are ordered as its value is. A histogram over their upper half finds the bin of that
    magnitude, one over the lower half of that bin the value itself: no sorting, no rounding.

    Returns:
        Its bits, and how many entries of just that magnitude are among the ``keep`` largest.
    """
    high = sum((torch.bincount(_bits(b) >> 16, minlength=2**15).cpu() for _, b in update.blocks()), torch.tensor(0))
    top, above = _bin_of(high, keep)
    low = torch.tensor(0)
    for _, block in update.blocks():
        bits = _bits(block)
        low = low + torch.bincount(bits[bits >> 16 == top] & 0xFFFF, minlength=2**16).cpu()
    rest, more = _bin_of(low, keep - above)
    return (top << 16) + rest, keep - above - more


class Trim:
    """Keeps exactly as many entries as ``threshold`` was asked for, in one pass: of those that equal it the first."""

    def __init__(self, bits: int, equal: int) -> None:
        """``bits`` and ``equal`` as ``threshold`` gives them; ``mask`` counts the latter down."""
        self.bits, self.equal = bits, equal

    def mask(self, block: Tensor) -> Tensor:
        """Bool of the block's shape; the blocks have to come in order, each once."""
        bits = _bits(block)
        stays, ties = bits > self.bits, torch.nonzero(bits == self.bits).flatten()[: self.equal]
        stays[ties] = True
        self.equal -= len(ties)
        return stays.view(block.shape)


def _bits(block: Tensor) -> Tensor:
    return block.abs().contiguous().view(torch.int32).flatten()


def _bin_of(histogram: Tensor, keep: int) -> tuple[int, int]:
    """The bin that holds the keep-th largest entry, and how many lie in higher ones."""
    from_top = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, keep))
    above = int(from_top[position - 1]) if position else 0
    return len(histogram) - 1 - position, above


def low_rank(update: Update, rank: int, *, seed: str) -> tuple[Factors, float]:
    """A streamed update's best factors of a rank, by a randomised SVD with power steps (arXiv 0909.4061).

    Its blocks are read 2 + 2 · POWER_STEPS times; in memory are its rows' blocks and (d_out + d_in) × (rank + 10).

    Args:
        update: of any rank.
        rank: wanted; lowered to the smaller side.
        seed: of the first directions, drawn on the CPU.

    Returns:
        The factors, float32, and the relative error ‖ΔW − B A‖_F / ‖ΔW‖_F, 0 for a zero update.

    Raises:
        UserError: the update is not finite.
    """
    d_out, d_in = update.shape
    width = min(rank + OVERSAMPLING, d_out, d_in)
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    right = torch.randn(d_in, width, generator=generator)
    for step in range(POWER_STEPS + 1):
        left = torch.empty(d_out, width)
        for start, block in update.blocks():
            left[start : start + len(block)] = (block @ right.to(block.device)).cpu()
        if not bool(left.isfinite().all()):
            raise UserError("the merged update is not finite; lower the adapters' coefficients")
        left = torch.linalg.qr(left.double())[0].float()
        right, energy = torch.zeros(d_in, width), 0.0
        for start, block in update.blocks():
            right += (block.T @ left[start : start + len(block)].to(block.device)).cpu()
            energy += float(block.double().square().sum())
        if step < POWER_STEPS:
            right = torch.linalg.qr(right.double())[0].float()
    found, _ = compress(Factors(right.T, left), rank)
    captured = frobenius(found) ** 2
    return found, (max(0.0, energy - captured) / energy) ** 0.5 if energy > 0 else 0.0
