"""Null spaces of a weight matrix W, right and left, exact or near (docs/methods.md §2.1; Null-LoRA, arXiv 2512.15233).

A d_out × d_in matrix with d_in > d_out maps at least d_in − d_out directions to nothing, whatever its values: they are
its *structural* null space. Every other null direction is a near one, a singular vector whose singular value is small
against the largest, and how small is a choice, `threshold`. Where the structural null space alone has more dimensions
than are kept (20,480 of a 70B model's down_proj, 28,672 × 20,480 numbers), a random part of it is taken, and the wide
matrix is never decomposed: only the Gram matrix of its short side is factored.

Everything runs in float64: a Gram matrix squares the singular values, so float64 resolves them down to about 1e-7 of
the largest, as a float32 decomposition of W itself would.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from nslora_dist.eigensolver import fix_signs, product
from nslora_dist.null_space import smallest_pairs

_SHIFT = 1e-13  # of λ_max; what stays of a direction after a pass is shift / (shift + σ²): 1e-9 at σ = 1e-2 σ_max
_PASSES = 3
_PIECE = 2**24  # entries of W held in float64 at a time


@dataclass(frozen=True)
class NullSide:
    """Null directions of x ↦ W x (right) or of y ↦ Wᵀ y (left).

    Attributes:
        basis: (n, k) float32, orthonormal columns, ascending singular value; k = 0 where there is none.
        ratios: (k,) float64 σ / σ_max of the columns; zeros for structural ones.
        structural: How many null directions the shape alone gives, of which `basis` may hold a part.
        second: σ / σ_max of the second smallest singular value found: the threshold from which there are two.
    """

    basis: Tensor
    ratios: Tensor
    structural: int
    second: float


@dataclass(frozen=True)
class WeightNull:
    """Both null spaces of one weight; the solver really used ("eigh", "fast", "eigh (fallback)") on near sides."""

    right: NullSide
    left: NullSide
    method: str


@dataclass(frozen=True)
class NullSizes:
    """Sizes of one module's Null-LoRA.

    Attributes:
        half: Rows of A and columns of B that train, and as many that are frozen: half the rank.
        right: k_in, columns of V.
        left: k_out, columns of U.
    """

    half: int
    right: int
    left: int

    @classmethod
    def fitted(cls, rank: int, *, right: int, left: int) -> Self:
        """The rank that two null spaces leave: ΔW = U (…) Vᵀ has none above min(k_in, k_out), and halves are equal."""
        return cls(half=min(rank, right, left) // 2, right=right, left=left)

    @property
    def rank(self) -> int:
        """r of the module, even; 0 where it has to be left out."""
        return 2 * self.half


@torch.no_grad()
def weight_null_space(
    weight: Tensor, *, dim: int, threshold: float, method: Literal["eigh", "fast"] = "eigh", seed: int = 0
) -> WeightNull:
    """Up to `dim` null directions of W on either side.

    A side whose structural null space has `dim` dimensions or more gets random ones of them, exactly null. Any other
    side gets the singular vectors with σ ≤ threshold · σ_max, smallest first, structural ones (σ = 0) included, from
    its own Gram matrix: W̃ = Wᵀ u / σ would carry the other side's vectors over, but divides their error by σ.

    Cost: a Gram matrix n³-like product a side, and on it `eigh` or, with "fast", one Cholesky factor; n is the short
    side, or for nearly square matrices (sides closer than `dim`) each in turn. Memory: n × n
    float64 matrices, two with "fast", four with `eigh`, and one more where both sides are decomposed.

    Args:
        weight: (d_out, d_in), any float dtype; dequantised if it was quantised.
        dim: Most directions kept a side.
        threshold: Largest σ / σ_max of a near null direction.
        method: Solver of the near sides; "fast" serves from 512 and about 12 · `dim` wide, as in `null_basis`.
        seed: Of the random structural directions; drawn on the CPU, so the same on every device.

    Returns:
        Both sides, on the weight's device.

    Raises:
        ValueError: If W is no matrix of a float dtype, an entry is not finite, or a number is out of range.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight {tuple(weight.shape)} of {weight.dtype}: a matrix of a float dtype is needed.")
    if dim < 1 or not 0.0 < threshold < 1.0:
        raise ValueError(f"dim {dim} and threshold {threshold}: want at least 1, and a number between 0 and 1.")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight holds values that are not finite: check the checkpoint and its dtype.")
    d_out, d_in = weight.shape
    inner = _gram(weight.T) if d_in - d_out < dim else None  # WᵀW
    outer = _gram(weight) if d_out - d_in < dim else None  # W Wᵀ
    known = inner if outer is None else outer
    assert known is not None
    largest = _largest(known)
    used = []
    sides = []
    for own, other, matrix in ((inner, outer, weight), (outer, inner, weight.T)):
        if own is None:
            assert other is not None
            sides.append(_structural(matrix, other, largest, dim=dim, seed=seed))
            continue
        found, label = smallest_pairs(own, rank=min(dim, own.shape[0]), method=method)
        ratios = (found.values.clamp_min(0) / largest).sqrt() if largest else torch.zeros_like(found.values)
        keep = ratios <= threshold
        basis = fix_signs(found.vectors[:, keep]).float() if bool(keep.any()) else own.new_empty(len(own), 0).float()
        structural = max(0, matrix.shape[1] - matrix.shape[0])
        sides.append(NullSide(basis, ratios[keep], structural, float(ratios[min(1, len(ratios) - 1)])))
        used.append(label)
    return WeightNull(sides[0], sides[1], max(used, key=len))


def _gram(matrix: Tensor) -> Tensor:
    """M Mᵀ (n, n) float64 of M (n, m), by pieces of columns."""
    total = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for piece in matrix.split(max(1, _PIECE // len(matrix)), dim=1):
        wide = piece.double()
        total.addmm_(wide, wide.T)
    return total


def _largest(gram: Tensor) -> float:
    """λ_max by block power iteration: from below, and to 1e-3 after 30 steps of 8 columns even for a flat spectrum.

    A σ_max that is slightly too small only makes the threshold slightly stricter.
    """
    draw = torch.randn(len(gram), min(8, len(gram)), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block = torch.linalg.qr(draw.to(gram.device))[0]
    for _ in range(30):
        block = torch.linalg.qr(gram @ block)[0]
    return float(torch.linalg.eigvalsh(block.T @ gram @ block)[-1])


def _structural(matrix: Tensor, gram: Tensor, largest: float, *, dim: int, seed: int) -> NullSide:
    """`dim` random directions that M (n × m, m ≥ n + dim) maps to zero, from the Gram M Mᵀ (n, n) alone.

    X − Mᵀ (M Mᵀ)⁻¹ M X takes the row space out of random columns; a shift keeps the factor of a rank-deficient M
    positive, and repeating the projection takes out what the shift, and rounding, left.
    """
    width = matrix.shape[1]
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(width, dim, dtype=torch.float64, generator=generator).to(matrix.device)
    columns = torch.linalg.qr(columns)[0]
    if largest:
        factor, shift = None, _SHIFT * largest
        while factor is None:
            shifted = gram.clone()
            shifted.diagonal().add_(shift)
            candidate, failed = torch.linalg.cholesky_ex(shifted)
            factor, shift = (None if int(failed) else candidate), 16 * shift
        for _ in range(_PASSES):
            image = torch.cholesky_solve(product(matrix, columns), factor)
            columns = torch.linalg.qr(columns - product(matrix.T, image))[0]
    ratios = torch.zeros(dim, dtype=torch.float64, device=matrix.device)
    return NullSide(fix_signs(columns).float(), ratios, width - len(matrix), 0.0)
