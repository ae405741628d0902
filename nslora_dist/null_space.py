"""Pure mathematics of the null space: Gram → basis, projected initialisation, leak, interference (docs/methods.md §1).

Everything here is a function of tensors: no process groups, no models, no files. Results do not depend on the device
of a random generator, and equal input gives equal output on one machine with one number of threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nslora_dist.eigensolver import (
    Eigenpairs,
    block_size,
    check_gram,
    column_signs,
    fix_signs,
    product,
    smallest_eigenpairs,
)

_FAST_MIN_WIDTH = 512  # below this a full eigh takes milliseconds


@dataclass(frozen=True)
class NullBasis:
    """The r directions in which calibration activations have least energy.

    Attributes:
        basis: (d_in, r) float32, orthonormal columns, ascending eigenvalue.
        eigenvalues: (r,) float64, ascending; slightly negative where they are below the Gram's rounding.
        method: What was really used: "eigh", "fast", or "eigh (fallback)" where fast missed its own bounds.
        residual: ‖G U − U Λ‖_F / ‖G‖_F before U is rounded to float32.
        iterations: Block steps of the fast solver; 0 for eigh and after a fallback.
    """

    basis: Tensor
    eigenvalues: Tensor
    method: str
    residual: float
    iterations: int


def null_basis(
    gram: Tensor, *, rank: int, method: Literal["eigh", "fast"] = "eigh", tolerance: float = 0.1
) -> NullBasis:
    """Eigenvectors for a Gram matrix's `rank` smallest eigenvalues (docs/methods.md §1.2; LoRA-Null, arXiv 2503.02659).

    "eigh" decomposes the whole matrix in float64 on the Gram's device, whatever its dtype: the wanted eigenvalues are
    the ones that float32 loses. "fast" finds only the wanted pairs (see `eigensolver`), checks its own result and
    falls back to eigh where a bound is missed; matrices too small to gain from it (d < 512, or rank beyond about
    d / 12) go to eigh at once. Where G is rank deficient by r or more, any r orthonormal null vectors are right, and
    the two methods give different ones of equal leak. The sign of each vector makes its largest entry positive.

    Memory beyond the Gram: eigh four float64 matrices of its size, LAPACK's workspace counted; fast one factor of its
    size and dtype, twice that while factoring (float64 if ill-conditioned), and, up to d = 8192, a float64 copy.

    Args:
        gram: (d_in, d_in) symmetric positive semi-definite up to rounding, float32 or float64, any device.
        rank: r, from 1 to d_in.
        method: "eigh" or "fast".
        tolerance: Fast only: by what part the leak may exceed the smallest possible one, as estimated from the
            convergence. The last correction usually leaves far less: 1.00 to 1.02 was measured on held-out activations.

    Returns:
        The basis, on the Gram's device.

    Raises:
        ValueError: If the Gram is not a square, finite, symmetric float32/float64 matrix; if rank, method or tolerance
            is out of range.
    """
    check_gram(gram)
    d = gram.shape[0]
    if not 1 <= rank <= d:
        raise ValueError(f"rank {rank} is outside 1..{d}, the width of the Gram: choose a rank in that range.")
    if method not in ("eigh", "fast"):
        raise ValueError(f"unknown solver method {method!r}: choose 'eigh' or 'fast'.")
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance {tolerance} is outside (0, 1): 0.1 suits most uses.")
    found, label = smallest_pairs(gram, rank=rank, method=method, tolerance=tolerance)
    return NullBasis(fix_signs(found.vectors).float(), found.values, label, found.residual, found.iterations)


def smallest_pairs(
    gram: Tensor, *, rank: int, method: Literal["eigh", "fast"], tolerance: float = 0.1
) -> tuple[Eigenpairs, str]:
    """The `rank` smallest eigenpairs in float64 and the method really used, chosen as `null_basis` says.

    Args:
        gram: (d, d) symmetric positive semi-definite up to rounding, float32 or float64.
        rank: Pairs wanted, 1 to d.
        method: "eigh" or "fast".
        tolerance: Of "fast".
    """
    label = "eigh"
    if method == "fast" and gram.shape[0] >= max(_FAST_MIN_WIDTH, 10 * block_size(rank)):
        found = smallest_eigenpairs(gram, rank=rank, tolerance=tolerance)
        if found is not None:
            return found, "fast"
        label = "eigh (fallback)"
    values, vectors = torch.linalg.eigh(gram.double())
    values, vectors = values[:rank].clone(), vectors[:, :rank].clone()
    error = torch.linalg.vector_norm(product(gram, vectors) - vectors * values)
    norm = torch.linalg.vector_norm(gram, dtype=torch.float64)
    return Eigenpairs(vectors, values, 0, float(error / norm) if norm > 0 else 0.0), label


def projected_init(weight: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """A₀ = S^½Qᵀ and B₀ = P S^½ of W U Uᵀ = P S Qᵀ (docs/methods.md §1.3; LoRA-Null, arXiv 2503.02659).

    Only the thin W U (d_out × r) is formed and decomposed. The product runs in float32, more than the weights hold and
    with nothing to cancel (float64 for a float64 W); the decomposition in float64, because its cost is negligible and
    small singular values, as W U may well have, keep their relative accuracy.

    W U has rank k < r where d_out < r or where W does not read some basis directions. There S = 0 would give zero rows
    of A₀, which a frozen A₀ could never use. Those rows are filled with the directions that complete Q within the
    span of U, scaled like the typical (median) row in use, and meet zero columns in B₀: the product B₀A₀ = W U Uᵀ is
    unaffected and A₀ keeps full rank. For W U = 0 the rows have unit length.

    Args:
        weight: (d_out, d_in), any float dtype; dequantise first.
        basis: (d_in, r) orthonormal columns, as `null_basis` returns them.

    Returns:
        A₀ (r, d_in) and B₀ (d_out, r), float32, on the weight's device.

    Raises:
        ValueError: If the shapes do not fit, an entry is not finite or the weight is not of a float dtype.
    """
    if weight.ndim != 2 or basis.ndim != 2 or weight.shape[1] != basis.shape[0]:
        raise ValueError(
            f"weight {tuple(weight.shape)} and basis {tuple(basis.shape)} do not fit: want (d_out, d_in), (d_in, r)."
        )
    if not weight.is_floating_point():
        raise ValueError(f"weight has dtype {weight.dtype}: dequantise it to a float dtype first.")
    basis = basis.to(weight.device)
    thin = product(weight, basis.to(torch.promote_types(weight.dtype, torch.float32))).double()
    if not bool(torch.isfinite(thin).all()):
        raise ValueError("weight or basis holds values that are not finite: check the checkpoint and its dtype.")
    orthonormal, triangle = torch.linalg.qr(thin)
    left, scale, right = torch.linalg.svd(triangle)  # right is (r, r): its last rows complete the span of U
    rank, k = basis.shape[1], scale.numel()
    live = int((scale > scale[0] * rank * torch.finfo(torch.float32).eps).sum())
    fill = scale[:live].median() if live else torch.ones_like(scale[0])
    root = torch.cat([scale[:live], fill.expand(rank - live)]).sqrt()
    columns = basis.double() @ right.mT
    signs = column_signs(columns)
    a0 = (columns * (signs * root)).mT
    b0 = torch.zeros(weight.shape[0], rank, dtype=torch.float64, device=weight.device)
    b0[:, :live] = (orthonormal @ left[:, :k])[:, :live] * (signs * root)[:live]
    return a0.float().contiguous(), b0.float()


def leak(gram: Tensor, basis: Tensor) -> float:
    """Share of the activations' energy inside the basis, tr(UᵀGU)/tr(G) (docs/methods.md §1c), computed in float64.

    Not clamped: where the true leak is below the Gram's rounding the result is that rounding, of either sign.

    Args:
        gram: (d_in, d_in), float32 or float64: of calibration tokens or of held-out ones.
        basis: (d_in, r), orthonormal columns.

    Returns:
        The leak, about r / d_in for a random basis; 0.0 for an all-zero Gram.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or basis.ndim != 2 or basis.shape[0] != gram.shape[0]:
        raise ValueError(f"gram {tuple(gram.shape)} and basis {tuple(basis.shape)} do not fit: (d, d) and (d, r).")
    return leak_of(gram_in_basis(gram, basis), gram)


def leak_of(small: Tensor, gram: Tensor) -> float:
    """``leak``, of a basis whose C = Uᵀ G U, (r, r) as ``gram_in_basis`` gives it, is at hand."""
    total = float(gram.diagonal().double().sum())
    return float(small.trace()) / total if total else 0.0


def gram_in_basis(gram: Tensor, basis: Tensor) -> Tensor:
    """C = Uᵀ G U in float64 (docs/methods.md §1c): of a Gram's weakest directions its large ones are to cancel.

    Args:
        gram: (d_in, d_in), float32 or float64.
        basis: U, (d_in, r), orthonormal columns.

    Returns:
        (r, r) float64, symmetric.
    """
    columns = basis.to(gram.device, torch.float64)
    found = columns.T @ product(gram, columns)
    return (found + found.T) / 2


def random_leak(gram: Tensor, *, rank: int, seed: int) -> float:
    """Leak of a random orthonormal basis, to hold a null basis against: about rank / d_in (docs/methods.md §1c).

    Args:
        gram: (d_in, d_in), float32 or float64.
        rank: Columns of the random basis, from 1 to d_in.
        seed: Seed of the basis; drawn on the CPU, so the same on every device.

    Returns:
        tr(UᵀGU)/tr(G).

    Raises:
        ValueError: If rank is outside 1..d_in or the Gram is not square.
    """
    if not 1 <= rank <= gram.shape[0]:
        raise ValueError(f"rank {rank} is outside 1..{gram.shape[0]}, the width of the Gram: choose one in that range.")
    draw = torch.randn(gram.shape[0], rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return leak(gram, torch.linalg.qr(draw.to(gram.device))[0])


def interference(update_gram: Tensor, b: Tensor, reference: float | Tensor) -> Tensor:
    """How far an update disturbs outputs, ‖ΔW X‖_F/‖W X‖_F = sqrt(tr(B C Bᵀ)/reference) (docs/methods.md §1c).

    Stays on the device and never waits for it, so that it can be logged at any step; no gradient is kept.

    Args:
        update_gram: C = A G Aᵀ, (r, r), float32 or float64.
        b: The update's B, (d_out, r), any float dtype: D = B − B₀ in delta form, with the adapter's scaling in it.
        reference: tr(W G Wᵀ) > 0, a number or a 0-dim tensor.

    Returns:
        0-dim tensor of the wider of the two dtypes, at least float32; rounding below zero gives 0.

    Raises:
        ValueError: If the shapes do not fit or a reference given as a number is not positive.
    """
    rank = b.shape[-1]
    if b.ndim != 2 or update_gram.shape != (rank, rank):
        raise ValueError(f"C {tuple(update_gram.shape)} and B {tuple(b.shape)} do not fit: (r, r) and (d_out, r).")
    if not isinstance(reference, Tensor) and not reference > 0:
        raise ValueError(f"reference tr(W G Wᵀ) is {reference}: it must be positive; was this module calibrated?")
    with torch.no_grad():
        dtype = torch.promote_types(torch.promote_types(update_gram.dtype, b.dtype), torch.float32)
        wide = b.to(dtype)
        energy = ((wide @ update_gram.to(b.device, dtype)) * wide).sum()
        return (energy.clamp_min(0) / reference).sqrt()


def mix_grams(
    grams: Sequence[Tensor], *, weights: Sequence[float] | None = None, traces: Sequence[float] | None = None
) -> Tensor:
    """Mixture of named sources, G = Σ_s w_s G_s/tr(G_s) · mean_s tr(G_s) (docs/methods.md §1d).

    Each source enters with its energy normalised, so that a long one does not drown a short one; the mean trace
    (unweighted) restores a common scale. Weights are normalised to sum to 1: [1, 1] and [5, 5] mean the same.

    Args:
        grams: (d_in, d_in) each, the same shape, dtype and device; left unchanged.
        weights: One non-negative number per source, None for equal ones; a source of weight 0 does not enter the sum.
        traces: tr(G_s) where they are known already (a Gram that is still spread over ranks has only a part of its
            trace); None to read them off the Grams.

    Returns:
        (d_in, d_in) in the Grams' dtype. One source comes out as it went in.

    Raises:
        ValueError: If there is no Gram, the counts or shapes differ, a weight is negative or all are 0, or a trace is
            not positive and finite.
    """
    if not grams:
        raise ValueError("no Grams to mix: name at least one calibration source.")
    if any(gram.shape != grams[0].shape for gram in grams):
        raise ValueError(f"Grams of different shapes {[tuple(gram.shape) for gram in grams]}: mix one group at a time.")
    weights = [1.0] * len(grams) if weights is None else [float(weight) for weight in weights]
    traces = [float(gram.diagonal().double().sum()) for gram in grams] if traces is None else [float(t) for t in traces]
    if len(weights) != len(grams) or len(traces) != len(grams):
        raise ValueError(f"{len(grams)} Grams, {len(weights)} weights, {len(traces)} traces: give one per source.")
    if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:
        raise ValueError(f"weights {weights} must be finite, not negative, and not all 0.")
    if not all(0 < trace < float("inf") for trace in traces):
        raise ValueError(f"traces {traces} must be positive and finite: a source without any token or with NaNs?")
    mean, total = sum(traces) / len(traces), sum(weights)
    mixed = grams[0] * (weights[0] / total * (mean / traces[0]))
    for gram, weight, trace in zip(grams[1:], weights[1:], traces[1:], strict=True):
        mixed.add_(gram, alpha=weight / total * (mean / trace))
    return mixed
