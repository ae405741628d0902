"""One group's null space from its reduced Grams: what the group's owner computes, with no collective in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nslora_dist.null_space import gram_in_basis, leak_of, mix_grams, null_basis, projected_init, random_leak

if TYPE_CHECKING:
    from nslora_dist.recipe_adapter import AdapterSection
    from nslora_dist.recipe_data import CalibrationSection

SPECTRUM_WIDTH = 2048
"""Up to this width the whole spectrum is computed for the report's plot; it costs one more eigenvalue solve."""


@dataclass
class Solution:
    """What one group's owner found; on the other ranks the same shapes, empty, to receive it.

    Attributes:
        basis: (d_in, r) float32.
        facts: (3 + r,) float64, what follows in one piece, for it travels: ``leak``, ``random_leak``, ``fell_back``
            (whether ``eigh`` had to step in), each (), and ``eigenvalues``, (r,).
        update_grams: (sources + 1, r, r) float32 Uᵀ G U of every source in order, then of their mixture.
        mixes: (modules, r, r) float32 M with A₀ = M Uᵀ; no modules for a_init: orthonormal.
        spectrum: (d_in,) float64 all eigenvalues of the mixture; (0,) for wide groups.
        start_b: module name → (d_out, r) float32 B₀; empty but in residual form.
    """

    basis: Tensor
    facts: Tensor
    update_grams: Tensor
    mixes: Tensor
    spectrum: Tensor
    start_b: dict[str, Tensor]

    @classmethod
    def empty(
        cls, width: int, outputs: Mapping[str, int], *, sources: int, adapter: AdapterSection, device: torch.device
    ) -> Solution:
        """Zeros of the shapes that the owner sends; ``outputs`` maps module names to d_out."""
        rank = adapter.rank
        residual = adapter.form == "residual"

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            basis=zeros(width, rank),
            facts=zeros(3 + rank, dtype=torch.float64),
            update_grams=zeros(sources + 1, rank, rank),
            mixes=zeros(len(outputs) if adapter.a_init == "projected" else 0, rank, rank),
            spectrum=zeros(width if width <= SPECTRUM_WIDTH else 0, dtype=torch.float64),
            start_b={name: zeros(size, rank) for name, size in outputs.items()} if residual else {},
        )

    @property
    def leak(self) -> Tensor:
        """See ``facts``, of which this is a view."""
        return self.facts[0]

    @property
    def random_leak(self) -> Tensor:
        """See ``facts``, of which this is a view."""
        return self.facts[1]

    @property
    def fell_back(self) -> Tensor:
        """See ``facts``, of which this is a view."""
        return self.facts[2]

    @property
    def eigenvalues(self) -> Tensor:
        """See ``facts``, of which this is a view."""
        return self.facts[3:]

    def tensors(self) -> list[Tensor]:
        """What travels, in a fixed order."""
        return [self.basis, self.facts, self.update_grams, self.mixes, self.spectrum, *self.start_b.values()]


@torch.no_grad()
def solve_group(
    grams: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    source_weights: Mapping[str, float],
    traces: Mapping[str, float],
    adapter: AdapterSection,
    section: CalibrationSection,
) -> Solution:
    """Mixes the sources' Grams, finds the null basis, and projects every module's start onto it.

    Args:
        grams: source → (d_in, d_in) float32, summed over ranks.
        weights: module name → (d_out, d_in) dense weight; none needed for a_init: orthonormal.
        source_weights: source → its weight in the recipe (docs/methods.md §1d).
        traces: source → tr(G_s) over all ranks.
        adapter: rank, form and a_init.
        section: solver and seed.

    Returns:
        The solution, on the Grams' device.
    """
    rank = adapter.rank
    if len(grams) == 1:  # mixing one source would only copy it, 3 GB of it in a 70B model's widest group
        (mixture,) = grams.values()
    else:
        names = list(grams)
        mixture = mix_grams(
            list(grams.values()), weights=[source_weights[n] for n in names], traces=[traces[n] for n in names]
        )
    width, device = mixture.shape[0], mixture.device
    found = null_basis(mixture, rank=rank, method=section.solver.method)
    solution = Solution.empty(
        width, {name: w.shape[0] for name, w in weights.items()}, sources=len(grams), adapter=adapter, device=device
    )
    basis = found.basis.float().contiguous()
    solution.basis = basis
    small = [gram_in_basis(gram, basis) for gram in grams.values()]
    small.append(small[0] if len(grams) == 1 else gram_in_basis(mixture, basis))
    solution.update_grams.copy_(torch.stack(small))
    solution.leak.fill_(leak_of(small[-1], mixture))
    solution.random_leak.fill_(random_leak(mixture, rank=rank, seed=section.seed))
    solution.fell_back.fill_("fallback" in found.method)
    solution.eigenvalues.copy_(found.eigenvalues)
    if solution.spectrum.numel():
        solution.spectrum = torch.linalg.eigvalsh(mixture.double())
    if adapter.a_init == "projected":
        for number, (name, weight) in enumerate(weights.items()):
            a, b = projected_init(weight, basis)
            solution.mixes[number] = a.float() @ basis
            if name in solution.start_b:
                solution.start_b[name] = b.float().contiguous()
    return solution
