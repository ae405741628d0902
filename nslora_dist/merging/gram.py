"""Gram-weighted merging: the regression mean in the coordinates of the low-rank factors (docs/methods.md §4).

Task k's own training activations X_k are known only through C_k = A_k G_k A_kᵀ, G_k = X_k X_kᵀ. Wanted is the ΔW with
the least Σ_k w_k ‖(ΔW − B_k A_k) X_k‖².

One A for all: ΔW = B A, the error of task k is tr((B − B_k) C_k (B − B_k)ᵀ), and B Σ w_k C_k = Σ w_k B_k C_k: exact.

Several A's: let the orthonormal columns of Q (d_in × m) span all their rows, T_k = A_k Q, ΔW = N Qᵀ. The error is then
tr((N − B_k T_k) H_k (N − B_k T_k)ᵀ) with H_k = Qᵀ G_k Q, of which C_k = T_k H_k T_kᵀ says only what task k's own rows
see. The rest would need cross Grams A_j G_k A_jᵀ, which a task that was trained alone cannot have stored. Taken is what
agrees with C_k on the own rows, T_k⁺ C_k (T_k⁺)ᵀ, and has their mean energy in every direction outside of them. (With
none there, two A's that are nearly equal, such as those of two trainings from one seed, would pull ΔW apart along their
small difference without bound.) So where A's grow equal the result goes over into the exact one above, and where their
rows are orthogonal each direction is a mean of the task that reads it and of the others, which want no change there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nslora_dist.export import Factors
from nslora_dist.merging.factors import share_a

ROUNDING = 1e-6
"""Directions with less than this share of the largest energy are rounding: Grams are stored in float32."""


def merge_by_grams(pairs: Sequence[Factors], grams: Sequence[Tensor], weights: Sequence[float]) -> Factors:
    """The Gram-weighted merge of one module's updates, float64 inside.

    Directions that no task uses cannot be told by the Grams: there the result is the mean of the tasks' updates. An
    adapter merged with itself comes out as it is, and the scale between an A and its B does not matter.

    Args:
        pairs: A_k (r_k, d_in), B_k (d_out, r_k), the scale in B_k.
        grams: C_k = A_k G_k A_kᵀ, (r_k, r_k), one each.
        weights: w_k > 0, one each.

    Returns:
        Factors of rank r where all share A, else of the rank of the stacked A's; float32.

    Raises:
        ValueError: counts or shapes do not fit, or a weight is not positive.
    """
    if not len(pairs) == len(grams) == len(weights) or not pairs:
        raise ValueError(f"{len(pairs)} updates, {len(grams)} Grams, {len(weights)} weights: give one of each a task")
    for pair, gram in zip(pairs, grams, strict=True):
        if gram.shape != (pair.rank, pair.rank):
            raise ValueError(f"Gram {tuple(gram.shape)} of an update of rank {pair.rank}: it must be rank x rank")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights {list(weights)} must be positive and finite")
    if share_a(pairs):
        b = _mean([p.lora_b.double() for p in pairs], [g.double() for g in grams], weights)
        return Factors(pairs[0].lora_a, b.float())
    q = row_basis([pair.lora_a for pair in pairs])
    local = [pair.lora_a.double() @ q for pair in pairs]
    back = [torch.linalg.pinv(t) for t in local]
    updates = [pair.lora_b.double() @ t for pair, t in zip(pairs, local, strict=True)]
    energies = [_filled(p @ gram.double() @ p.T, p @ t) for p, t, gram in zip(back, local, grams, strict=True)]
    merged = _mean(updates, energies, weights)
    return Factors(q.T.float(), merged.float())


def _filled(energy: Tensor, own: Tensor) -> Tensor:
    """H_k, of what is known on the rows that ``own`` projects onto: their mean energy in every other direction."""
    mean = energy.trace() / own.trace().clamp_min(1.0)
    return energy + mean * (torch.eye(len(own), dtype=own.dtype, device=own.device) - own)


def row_basis(downs: Sequence[Tensor]) -> Tensor:
    """Orthonormal columns (d_in, m) that span all rows of the A's, float64; m is their common rank.

    Each A counts with its rows' own size, so that a small A (a null-space one) is not taken for rounding.
    """
    scaled = []
    for a in downs:
        norm = torch.linalg.matrix_norm(a.double(), 2)
        scaled.append(a.double() / norm if norm > 0 else a.double())
    q, r = torch.linalg.qr(torch.cat(scaled).T)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    return q @ u[:, s > 1e-7 * s[0]]


def _mean(updates: Sequence[Tensor], energies: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """N₀ + Σ w_k (N_k − N₀) H_k (Σ w_k H_k)⁺: a minimiser of Σ w_k tr((N − N_k) H_k (N − N_k)ᵀ).

    N₀, the mean of the N_k, is what stays in directions of no energy. Written as a correction of it, the result is
    exact where all N_k agree.
    """
    start = torch.stack(list(updates)).mean(0)
    total = torch.zeros_like(energies[0])
    pull = torch.zeros_like(start)
    for update, energy, weight in zip(updates, energies, weights, strict=True):
        energy = (energy + energy.T) / 2
        total += weight * energy
        pull += weight * (update - start) @ energy
    return start + pull @ torch.linalg.pinv(total, rtol=ROUNDING, hermitian=True)
