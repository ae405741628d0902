"""Null spaces of weights against float64 singular value decompositions (docs/methods.md §2.1)."""

import math

import pytest
import torch
from torch import Tensor

from nslora_dist.weight_null import NullSide, NullSizes, WeightNull, weight_null_space


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(d_out: int, d_in: int, values: Tensor) -> Tensor:
    left = torch.linalg.qr(normal(d_out, len(values), seed=1))[0]
    right = torch.linalg.qr(normal(d_in, len(values), seed=2))[0]
    return left * values @ right.T


def decades(count: int, low: float) -> Tensor:
    return torch.logspace(0, math.log10(low), count, dtype=torch.float64)


def check_span(side: NullSide, vectors: Tensor, ratios: Tensor, threshold: float) -> None:
    """The basis spans the singular vectors up to the threshold and is orthogonal to all others."""
    retained = vectors[:, ratios > threshold]
    assert side.basis.shape == (len(vectors), int((ratios <= threshold).sum()))
    assert (retained.T @ side.basis.double()).abs().max() < 1e-6
    eye = torch.eye(side.basis.shape[1], dtype=torch.float64)
    torch.testing.assert_close(side.basis.double().T @ side.basis.double(), eye, atol=1e-6, rtol=0)
    torch.testing.assert_close(side.ratios, ratios[ratios <= threshold].sort().values, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("d_out", "d_in"), [(48, 48), (40, 48), (48, 40), (20, 64), (64, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_near_null_spaces_are_those_of_the_svd(d_out: int, d_in: int, dtype: torch.dtype) -> None:
    """Sides closer than ``dim``: exact null directions and near ones, from smallest to largest, on both sides."""
    weight = with_spectrum(d_out, d_in, decades(min(d_out, d_in), 1e-3)).to(dtype)
    found = weight_null_space(weight, dim=256, threshold=0.05)
    p, s, q = torch.linalg.svd(weight.double())
    ratios = s / s[0]
    assert bool((ratios <= 0.05).any()) and bool((ratios > 0.05).any())
    padded = [torch.cat([ratios, ratios.new_zeros(n - len(ratios))]) for n in (d_in, d_out)]
    check_span(found.right, q.T, padded[0], 0.05)
    check_span(found.left, p, padded[1], 0.05)
    assert (found.right.structural, found.left.structural) == (max(0, d_in - d_out), max(0, d_out - d_in))
    assert found.right.second == pytest.approx(float(padded[0].sort().values[1]), rel=1e-3, abs=1e-7)


def test_no_more_than_dim_and_the_smallest_first() -> None:
    weight = with_spectrum(48, 48, decades(48, 1e-3))
    found = weight_null_space(weight, dim=5, threshold=0.05)
    _, s, q = torch.linalg.svd(weight)
    assert found.right.basis.shape == (48, 5) and found.left.basis.shape == (48, 5)
    assert (q[:-5] @ found.right.basis.double()).abs().max() < 1e-6
    torch.testing.assert_close(found.right.ratios, (s / s[0]).flip(0)[:5], rtol=1e-3, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_structural_null_space_of_a_wide_matrix(transposed: bool) -> None:
    """At ``dim`` or more structural directions, random ones of them: exactly null, seeded, not a row space's."""
    weight = normal(24, 96)
    matrix = weight.T if transposed else weight

    def side(seed: int) -> tuple[NullSide, WeightNull]:
        found = weight_null_space(matrix, dim=32, threshold=0.3, seed=seed)
        return (found.left if transposed else found.right), found

    one, found = side(0)
    near = found.right if transposed else found.left
    assert one.structural == 72 and one.basis.shape == (96, 32) and one.second == 0.0
    assert (weight @ one.basis.double()).norm() < 1e-6 * torch.linalg.matrix_norm(weight, 2)
    torch.testing.assert_close(one.basis.T @ one.basis, torch.eye(32), atol=1e-6, rtol=0)
    ratios = torch.linalg.svdvals(weight)
    assert near.basis.shape == (24, int((ratios / ratios[0] <= 0.3).sum()))
    assert torch.equal(side(0)[0].basis, one.basis)
    other = side(1)[0].basis
    assert torch.linalg.svdvals(other.T @ one.basis)[-1] < 0.9, "the seed chose nothing"


def test_a_wide_matrix_of_low_rank() -> None:
    """Its Gram matrix is singular; its random null directions are null all the same."""
    weight = with_spectrum(24, 96, decades(10, 1e-2)).float()
    found = weight_null_space(weight, dim=32, threshold=1e-4)
    assert (weight.double() @ found.right.basis.double()).norm() < 1e-6
    assert found.left.basis.shape == (24, 14)
    assert (weight.double().T @ found.left.basis.double()).norm() < 1e-5


def test_structural_directions_avoid_small_singular_vectors_too() -> None:
    """σ down to 1e-5 of the largest: what the shift of the factor leaves of them, repeated projections take out."""
    weight = with_spectrum(24, 96, decades(24, 1e-5))
    found = weight_null_space(weight, dim=32, threshold=1e-6)
    retained = torch.linalg.svd(weight, full_matrices=False)[2]
    assert (retained @ found.right.basis.double()).abs().max() < 1e-6


def test_a_weight_of_zeros_is_null_everywhere() -> None:
    found = weight_null_space(torch.zeros(4, 12), dim=6, threshold=0.1)
    assert found.right.basis.shape == (12, 6) and found.left.basis.shape == (4, 4)


def test_a_well_conditioned_weight_has_none() -> None:
    found = weight_null_space(torch.eye(6), dim=4, threshold=0.5)
    assert found.right.basis.shape == (6, 0) and found.left.basis.shape == (6, 0)
    assert found.right.second == pytest.approx(1.0, rel=1e-6)


def test_fast_solver_finds_directions_as_null_as_the_best() -> None:
    weight = with_spectrum(512, 512, decades(512, 1e-4)).float()
    found = weight_null_space(weight, dim=16, threshold=0.1, method="fast")
    assert found.method == "fast"
    smallest = torch.linalg.svdvals(weight.double())[-16:]
    for basis, matrix in ((found.right.basis, weight), (found.left.basis, weight.T)):
        assert basis.shape == (512, 16)
        assert (matrix.double() @ basis.double()).norm() < 1.05 * smallest.norm()


def test_what_cannot_be_decomposed_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        weight_null_space(torch.tensor([[1.0, float("nan")]]), dim=1, threshold=0.1)
    with pytest.raises(ValueError, match="float dtype"):
        weight_null_space(torch.ones(2, 2, dtype=torch.int8), dim=1, threshold=0.1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        weight_null_space(torch.eye(2), dim=1, threshold=1.0)


@pytest.mark.parametrize(
    ("rank", "right", "left", "fits"), [(8, 99, 99, 8), (8, 5, 99, 4), (8, 99, 3, 2), (8, 1, 99, 0), (8, 0, 9, 0)]
)
def test_rank_follows_the_smaller_null_space(rank: int, right: int, left: int, fits: int) -> None:
    assert NullSizes.fitted(rank, right=right, left=left).rank == fits
