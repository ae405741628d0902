"""Sums of low-rank updates and their compression, without ever forming d_out × d_in (docs/methods.md §4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nslora_dist.export import Factors


def share_a(pairs: Sequence[Factors]) -> bool:
    """Whether all have the very same A: their updates then add up at the rank of one."""
    return all(torch.equal(pair.lora_a, pairs[0].lora_a) for pair in pairs[1:])


def concatenate(pairs: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    """Σ λ_k B_k A_k = [λ₁B₁ … λ_KB_K] [A₁; …; A_K], exact, of rank Σ r_k.

    Args:
        pairs: A_k (r_k, d_in) and B_k (d_out, r_k), the scale in B_k; ranks may differ.
        coefficients: λ_k, one each.

    Raises:
        ValueError: not one coefficient for each.
    """
    _check(pairs, coefficients)
    b = [coefficient * pair.lora_b for coefficient, pair in zip(coefficients, pairs, strict=True)]
    return Factors(torch.cat([pair.lora_a for pair in pairs]), torch.cat(b, dim=1))


def add(pairs: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    """Σ λ_k B_k A_k, exact, at the smallest rank that needs no rounding: equal A's are kept once (docs/methods.md §4).

    Where all share A the rank stays r and B = Σ λ_k B_k; where none do, this is ``concatenate``.

    Raises:
        ValueError: not one coefficient for each.
    """
    _check(pairs, coefficients)
    kept: list[Factors] = []
    for pair, coefficient in zip(pairs, coefficients, strict=True):
        b = coefficient * pair.lora_b
        for position, other in enumerate(kept):
            if torch.equal(other.lora_a, pair.lora_a):
                kept[position] = Factors(other.lora_a, other.lora_b + b)
                break
        else:
            kept.append(Factors(pair.lora_a, b))
    return concatenate(kept, [1.0] * len(kept))


def compress(pair: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of B A of this rank, by an SVD of its (R × R) core; float64 inside.

    With Aᵀ = Q_a R_a and B = Q_b R_b the update is Q_b (R_b R_aᵀ) Q_aᵀ. Its singular values are split evenly, so that
    neither factor is much larger than the other.

    Args:
        pair: of rank R.
        rank: above the rank that B A can have, it is lowered to that.

    Returns:
        The factors, float32, and the relative error ‖B A − B' A'‖_F / ‖B A‖_F, 0 for a zero update.
    """
    qa, ra = torch.linalg.qr(pair.lora_a.double().T)
    qb, rb = torch.linalg.qr(pair.lora_b.double())
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    u, vt = u[:, : len(s)], vt[: len(s)]
    keep = min(rank, len(s))
    root = s[:keep].sqrt()
    made = Factors((root[:, None] * (vt[:keep] @ qa.T)).float(), (qb @ (u[:, :keep] * root)).float())
    total = float(s.square().sum())
    lost = float(s[keep:].square().sum())
    return made, (lost / total) ** 0.5 if total > 0 else 0.0


def frobenius(pair: Factors) -> float:
    """‖B A‖_F in float64, from r × r matrices: sqrt(tr(BᵀB A Aᵀ))."""
    a, b = pair.lora_a.double(), pair.lora_b.double()
    energy: Tensor = ((b.T @ b) * (a @ a.T)).sum()
    return float(energy.clamp_min(0.0).sqrt())


def _check(pairs: Sequence[Factors], coefficients: Sequence[float]) -> None:
    if len(pairs) != len(coefficients) or not pairs:
        raise ValueError(f"{len(pairs)} updates, {len(coefficients)} coefficients: give one for each, at least one")
