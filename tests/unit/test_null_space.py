"""The null-space mathematics against float64 references written from docs/methods.md §1, not from the module."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nslora_dist import eigensolver
from nslora_dist.null_space import (
    interference,
    leak,
    mix_grams,
    null_basis,
    projected_init,
    random_leak,
)
from nslora_dist.triangle import pack_triangle, unpack_triangle

WIDTH = 512  # the smallest width that the fast solver takes on
RANK = 8


@functools.cache
def rotation(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(width, width, seed=seed))[0]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum_factor(kind: str) -> Tensor:
    """M, so that rows of Z M are activations with the named covariance."""
    place = torch.arange(WIDTH, dtype=torch.float64)
    energy = 10 ** (-8 * place / (WIDTH - 1)) if kind == "eight_decades_outliers" else 1 / (place + 1)
    if kind == "deficient":
        energy[WIDTH // 2 :] = 0
    factor = energy.sqrt()[:, None] * rotation(WIDTH, 1)
    if kind == "eight_decades_outliers":
        factor[:, [3, 77, 400]] *= 1000
    if kind == "duplicated":
        factor[:, WIDTH // 2 :] = factor[:, : WIDTH // 2]
    if kind == "dead":
        factor[:, ::3] = 0
    return factor


KINDS = ["slow", "eight_decades_outliers", "deficient", "duplicated", "dead", "few_tokens"]


@functools.cache
def make(kind: str) -> tuple[Tensor, Tensor]:
    """A float32 Gram of 2,048 calibration tokens (100 for few_tokens), and held-out activations in float64."""
    factor = spectrum_factor(kind)
    tokens = (normal(100 if kind == "few_tokens" else 2048, WIDTH, seed=2) @ factor).float()
    return tokens.mT @ tokens, normal(1024, WIDTH, seed=3) @ factor


def energy_share(held_out: Tensor, basis: Tensor) -> float:
    return float((held_out @ basis.double()).square().sum() / held_out.square().sum())


@functools.cache
def reference_basis(kind: str) -> Tensor:
    return torch.linalg.eigh(make(kind)[0].double())[1][:, :RANK]


def assert_orthonormal(basis: Tensor) -> None:
    # float32 storage rounds each entry by 6e-8 of itself, so products of unit columns are off by at most about that.
    wide = basis.double()
    assert torch.allclose(wide.mT @ wide, torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=5e-7)


class TestNullBasis:
    @pytest.mark.parametrize("kind", KINDS)
    def test_fast_leaks_no_more_than_eigh_on_held_out_activations(self, kind: str) -> None:
        gram, held_out = make(kind)
        found = null_basis(gram, rank=RANK, method="fast")
        assert found.method == "fast"
        assert found.basis.dtype == torch.float32 and found.basis.shape == (WIDTH, RANK)
        assert_orthonormal(found.basis)
        assert bool((found.eigenvalues.diff() >= 0).all())
        wanted = energy_share(held_out, reference_basis(kind))
        # 1.1 is the module's promise. The floor covers bases that both leak nothing but rounding: float32 storage of
        # the basis moves 1e-15 of its energy, times a margin for the contamination by the rounding of the Gram.
        assert energy_share(held_out, found.basis) <= 1.1 * wanted + (
            2e-14 if kind in ("deficient", "duplicated", "dead") else 0
        )

    @pytest.mark.parametrize("kind", ["deficient", "duplicated", "dead"])
    def test_exact_null_space_is_found(self, kind: str) -> None:
        gram, held_out = make(kind)
        for method in ("eigh", "fast"):
            basis = null_basis(gram, rank=RANK, method=method).basis
            # Rounding of a float32 Gram is 6e-8; the leak goes with its square over the smallest eigenvalue's share
            # of the energy (about 1e-3): 1e-11 leaves room, and a real miss costs 1e-3.
            assert energy_share(held_out, basis) < 1e-11

    def test_fast_agrees_with_eigh_where_the_null_space_is_separated(self) -> None:
        energy = torch.ones(WIDTH, dtype=torch.float64)
        energy[:RANK] = torch.linspace(1e-3, 2e-3, RANK, dtype=torch.float64)
        turn = rotation(WIDTH, 4)
        gram = (turn * energy) @ turn.mT
        found = null_basis(gram, rank=RANK, method="fast")
        # A float64 Gram with a gap of 1e3: what is left is the solver's own stop, an excess of at most 5% in the trace
        # before the last correction, which divides it by about the square of the gap.
        assert found.method == "fast"
        assert torch.allclose(found.eigenvalues, energy[:RANK], rtol=1e-6)
        overlap = torch.linalg.svdvals(turn[:, :RANK].mT @ found.basis.double())
        assert float(overlap.min()) > 1 - 1e-6  # float32 storage

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_eigh_matches_a_full_decomposition(self, dtype: torch.dtype) -> None:
        factor = normal(60, 24, seed=5)
        gram = (factor.mT @ factor).to(dtype)
        found = null_basis(gram, rank=5)
        values, vectors = torch.linalg.eigh(gram.double())
        assert found.method == "eigh" and found.iterations == 0
        assert found.eigenvalues.dtype == torch.float64
        assert torch.equal(found.eigenvalues, values[:5])
        cosines = (vectors[:, :5] * found.basis.double()).sum(0).abs()
        assert torch.allclose(cosines, torch.ones_like(cosines), rtol=0, atol=1e-6)  # float32 storage
        assert found.residual < 1e-14  # float64 eigh is backward stable

    def test_every_rank_up_to_the_width(self) -> None:
        gram = torch.diag(torch.arange(1.0, 7.0))
        for rank in range(1, 7):
            found = null_basis(gram, rank=rank, method="fast")
            assert found.method == "eigh"  # too small for fast to gain anything
            assert torch.equal(found.basis, torch.eye(6)[:, :rank])

    def test_one_by_one_and_zero(self) -> None:
        assert null_basis(torch.tensor([[2.0]]), rank=1).basis.item() == 1.0
        for method in ("eigh", "fast"):
            found = null_basis(torch.zeros(WIDTH, WIDTH), rank=RANK, method=method)
            assert_orthonormal(found.basis)
            assert found.eigenvalues.abs().max() == 0 and found.residual == 0.0

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_scale_of_the_gram_does_not_matter(self, scale: float) -> None:
        gram, held_out = make("slow")
        found = null_basis(gram * scale, rank=RANK, method="fast")
        assert found.method == "fast"
        assert energy_share(held_out, found.basis) <= 1.1 * energy_share(held_out, reference_basis("slow"))

    def test_float64_gram_is_solved_beyond_float32(self) -> None:
        energy = torch.logspace(0, -12, WIDTH, dtype=torch.float64)
        turn = rotation(WIDTH, 6)
        gram = (turn * energy) @ turn.mT
        gram = (gram + gram.mT) / 2
        found = null_basis(gram, rank=RANK, method="fast")
        assert found.method == "fast"
        # 1.1: the module's promise; float64 rounding (1e-16) is four decades below the smallest eigenvalue, 1e-12.
        assert float(found.eigenvalues.sum()) <= 1.1 * float(energy[-RANK:].sum())

    @pytest.mark.parametrize("method", ["eigh", "fast"])
    def test_equal_input_gives_equal_output_and_leaves_the_gram_alone(self, method: str) -> None:
        gram, _ = make("slow")
        before = gram.clone()
        torch.manual_seed(1)
        first = null_basis(gram, rank=RANK, method=method)
        torch.manual_seed(2)  # the solver has its own generator
        second = null_basis(gram.clone(), rank=RANK, method=method)
        assert torch.equal(first.basis, second.basis) and torch.equal(first.eigenvalues, second.eigenvalues)
        assert torch.equal(gram, before)

    @pytest.mark.parametrize("method", ["eigh", "fast"])
    def test_largest_entry_of_each_vector_is_positive(self, method: str) -> None:
        basis = null_basis(make("slow")[0], rank=RANK, method=method).basis
        assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())

    def test_ill_conditioned_gram_gets_a_float64_factor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        used = []
        solve = torch.linalg.cholesky_ex
        monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: used.append(a.dtype) or solve(a))
        null_basis(make("slow")[0], rank=RANK, method="fast")
        assert used == [torch.float32]
        null_basis(make("eight_decades_outliers")[0], rank=RANK, method="fast")
        assert torch.float64 in used

    def test_falls_back_to_eigh_and_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gram, _ = make("slow")
        monkeypatch.setattr(eigensolver, "_SHIFT_GROWTH", ())  # no factorisation ever succeeds
        found = null_basis(gram, rank=RANK, method="fast")
        assert found.method == "eigh (fallback)"
        assert torch.equal(found.basis, null_basis(gram, rank=RANK, method="eigh").basis)

    def test_a_missed_bound_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(eigensolver, "_MAX_STEPS", 1)
        monkeypatch.setattr(eigensolver, "_MAX_CORRECTIONS", 1)
        found = null_basis(make("slow")[0], rank=RANK, method="fast", tolerance=1e-9)
        assert found.method == "eigh (fallback)"

    def test_tighter_tolerance_comes_closer(self) -> None:
        gram, _ = make("slow")
        best = float(torch.linalg.eigvalsh(gram.double())[:RANK].sum())
        loose, tight = (
            float(null_basis(gram, rank=RANK, method="fast", tolerance=tolerance).eigenvalues.sum()) / best - 1
            for tolerance in (0.05, 1e-4)
        )
        # Ritz values lie above the eigenvalues (up to float64 rounding); the bounds are the tolerances themselves.
        assert -1e-9 <= tight <= 1e-4 and tight <= loose <= 0.05

    @pytest.mark.parametrize(
        ("gram", "arguments", "message"),
        [
            (torch.zeros(3, 4), {"rank": 1}, "square"),
            (torch.zeros(3), {"rank": 1}, "square"),
            (torch.zeros(0, 0), {"rank": 1}, "square"),
            (torch.eye(3).half(), {"rank": 1}, "float32 or float64"),
            (torch.full((3, 3), math.nan), {"rank": 1}, "not finite"),
            (torch.diag(torch.tensor([1.0, math.inf])), {"rank": 1}, "not finite"),
            (torch.eye(3), {"rank": 0}, "rank 0"),
            (torch.eye(3), {"rank": 4}, r"rank 4 is outside 1\.\.3"),
            (torch.eye(3), {"rank": 1, "method": "svd"}, "'svd'"),
            (torch.eye(3), {"rank": 1, "tolerance": 0.0}, "tolerance 0.0"),
            (torch.ones(3, 3).tril(), {"rank": 1}, "not symmetric"),
        ],
    )
    def test_bad_input_is_named(self, gram: Tensor, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            null_basis(gram, **arguments)


class TestProduct:
    def test_rows_are_converted_in_parts(self) -> None:
        gram = normal(3000, 3000, seed=7).float()  # more than one part of 2**22 entries
        block = normal(3000, 3, seed=8)
        assert torch.allclose(eigensolver.product(gram, block), gram.double() @ block, rtol=1e-12, atol=1e-10)


def basis_of(d_in: int, rank: int) -> Tensor:
    return torch.linalg.qr(normal(d_in, rank, seed=9))[0].float()


class TestProjectedInit:
    @pytest.mark.parametrize(("d_out", "d_in", "rank"), [(40, 24, 6), (24, 40, 6), (300, 16, 16), (6, 30, 6)])
    def test_matches_the_svd_of_the_projected_weight(self, d_out: int, d_in: int, rank: int) -> None:
        weight, basis = normal(d_out, d_in, seed=10).float(), basis_of(d_in, rank)
        a0, b0 = projected_init(weight, basis)
        wide = basis.double()
        target = weight.double() @ wide @ wide.mT
        left, scale, right = torch.linalg.svd(target, full_matrices=False)
        assert a0.dtype == b0.dtype == torch.float32
        assert a0.shape == (rank, d_in) and b0.shape == (d_out, rank)
        # 1e-6 of the largest entry: a float32 product over at most 40 columns and float32 storage of both factors.
        size = float(target.abs().max())
        assert torch.allclose(b0.double() @ a0.double(), target, rtol=0, atol=2e-6 * size)
        # A₀ = S^½Qᵀ and B₀ = P S^½ up to one sign per row, so row and column norms and |cosines| are the reference's.
        root = scale[:rank].sqrt()
        assert torch.allclose(a0.double().norm(dim=1), root, rtol=1e-5)
        assert torch.allclose(b0.double().norm(dim=0), root, rtol=1e-5)
        assert torch.allclose((a0.double() * right[:rank]).sum(1).abs(), root, rtol=1e-4)
        assert torch.allclose((b0.double() * left[:, :rank]).sum(0).abs(), root, rtol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_any_float_weight(self, dtype: torch.dtype) -> None:
        weight, basis = normal(20, 12, seed=11).to(dtype), basis_of(12, 4)
        a0, b0 = projected_init(weight, basis)
        wide = basis.double()
        # The weight's own values are exact in the reference: the tolerance is float32's, whatever the weight's dtype.
        assert torch.allclose(b0.double() @ a0.double(), weight.double() @ wide @ wide.mT, rtol=0, atol=5e-6)

    @pytest.mark.parametrize("live", [0, 1, 3])
    def test_directions_the_weight_does_not_read_keep_a_row(self, live: int) -> None:
        rank, d_in = 6, 20
        basis = basis_of(d_in, rank)
        weight = (normal(15, live, seed=12) @ basis[:, :live].double().mT).float()
        a0, b0 = projected_init(weight, basis)
        self.check_filled(weight, basis, a0, b0, live)

    def test_fewer_outputs_than_rank(self) -> None:
        weight, basis = normal(3, 20, seed=13).float(), basis_of(20, 6)
        a0, b0 = projected_init(weight, basis)
        assert a0.shape == (6, 20) and b0.shape == (3, 6)
        self.check_filled(weight, basis, a0, b0, 3)

    @staticmethod
    def check_filled(weight: Tensor, basis: Tensor, a0: Tensor, b0: Tensor, live: int) -> None:
        wide = basis.double()
        target = weight.double() @ wide @ wide.mT
        assert torch.allclose(b0.double() @ a0.double(), target, rtol=0, atol=5e-6)  # float32 storage, entries of O(1)
        assert bool((b0[:, live:] == 0).all())
        lengths = a0.double().norm(dim=1)
        typical = lengths[:live].square().median().sqrt() if live else torch.tensor(1.0, dtype=torch.float64)
        assert torch.allclose(lengths[live:], typical.expand(len(lengths) - live), rtol=1e-5)
        unit = a0.double() / lengths[:, None]
        # Rows are orthogonal and within span(U); float32 storage.
        assert torch.allclose(unit @ unit.mT, torch.eye(len(lengths), dtype=torch.float64), rtol=0, atol=2e-6)
        assert torch.allclose(unit @ wide @ wide.mT, unit, rtol=0, atol=2e-6)

    def test_small_singular_values_keep_their_accuracy(self) -> None:
        scale = torch.logspace(0, -5, 6, dtype=torch.float64)
        basis = torch.eye(30)[:, :6]
        weight = torch.linalg.qr(normal(50, 6, seed=14))[0] * scale
        weight = torch.cat([weight, normal(50, 24, seed=15)], dim=1)
        a0, _ = projected_init(weight, basis)  # a float64 weight, so that only the method limits
        assert torch.allclose(a0.double().norm(dim=1).square(), scale, rtol=1e-5)

    def test_deterministic(self) -> None:
        weight, basis = normal(20, 12, seed=16).float(), basis_of(12, 4)
        for one, other in zip(projected_init(weight, basis), projected_init(weight.clone(), basis), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize(
        ("weight", "basis", "message"),
        [
            (torch.zeros(4, 5), torch.zeros(6, 2), "do not fit"),
            (torch.zeros(4), torch.zeros(4, 2), "do not fit"),
            (torch.zeros(4, 5, dtype=torch.uint8), torch.zeros(5, 2), "dequantise"),
            (torch.full((4, 5), math.nan), torch.eye(5)[:, :2], "not finite"),
        ],
    )
    def test_bad_input_is_named(self, weight: Tensor, basis: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            projected_init(weight, basis)


class TestLeak:
    def test_is_the_share_of_the_tokens_energy(self) -> None:
        tokens, basis = normal(50, 20, seed=17), basis_of(20, 3)
        gram = tokens.mT @ tokens
        assert leak(gram, basis) == pytest.approx(energy_share(tokens, basis), rel=1e-12)  # float64 throughout
        assert leak(gram.float(), basis) == pytest.approx(energy_share(tokens, basis), rel=1e-5)  # a float32 Gram

    def test_whole_space_and_zero(self) -> None:
        assert leak(torch.eye(4) * 3, torch.eye(4)) == 1.0
        assert leak(torch.zeros(4, 4), torch.eye(4)) == 0.0

    def test_random_basis_leaks_its_share_of_dimensions(self) -> None:
        gram = torch.eye(200)
        assert random_leak(gram, rank=10, seed=0) == pytest.approx(10 / 200, rel=1e-12)  # exact for a white Gram
        skewed = torch.diag(torch.linspace(0, 1, 200))
        first = random_leak(skewed, rank=10, seed=0)
        assert first == random_leak(skewed, rank=10, seed=0) != random_leak(skewed, rank=10, seed=1)
        # 2,000 squared normals weighted by at most 1: a standard deviation of about 4%; five of them.
        assert first == pytest.approx(10 / 200, rel=0.2)

    def test_bad_input_is_named(self) -> None:
        with pytest.raises(ValueError, match="do not fit"):
            leak(torch.eye(4), torch.eye(3))
        with pytest.raises(ValueError, match="rank 5"):
            random_leak(torch.eye(4), rank=5, seed=0)


class TestInterference:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
    def test_is_the_relative_disturbance_of_the_outputs(self, dtype: torch.dtype, tolerance: float) -> None:
        weight, tokens = normal(9, 12, seed=18), normal(12, 40, seed=19)  # tokens as columns, as in docs/methods.md
        a, b = normal(4, 12, seed=20), normal(9, 4, seed=21)
        gram = tokens @ tokens.mT
        expected = float((b @ a @ tokens).norm() / (weight @ tokens).norm())
        reference = float(torch.trace(weight @ gram @ weight.mT))
        found = interference((a @ gram @ a.mT).to(dtype), b.to(dtype), reference)
        assert found.dtype == dtype and found.ndim == 0
        assert float(found) == pytest.approx(expected, rel=tolerance)  # the dtype's rounding over sums of 400 terms
        as_tensor = interference((a @ gram @ a.mT).to(dtype), b.to(dtype), torch.tensor(reference, dtype=dtype))
        assert float(as_tensor) == pytest.approx(expected, rel=tolerance)

    def test_zero_update_low_precision_and_no_gradient(self) -> None:
        b = torch.zeros(5, 3, dtype=torch.bfloat16, requires_grad=True)
        found = interference(torch.eye(3), b, 2.0)
        assert float(found) == 0.0 and found.dtype == torch.float32 and not found.requires_grad

    def test_rounding_below_zero_is_zero(self) -> None:
        assert float(interference(torch.tensor([[-1e-9]]), torch.ones(2, 1), 1.0)) == 0.0

    def test_bad_input_is_named(self) -> None:
        with pytest.raises(ValueError, match="do not fit"):
            interference(torch.eye(3), torch.zeros(5, 2), 1.0)
        for reference in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="must be positive"):
                interference(torch.eye(2), torch.zeros(5, 2), reference)


class TestMixGrams:
    def test_formula(self) -> None:
        grams = [torch.diag(normal(5, seed=seed).square()) * 10.0**seed for seed in (1, 2, 3)]
        weights = [0.5, 0.3, 0.2]
        traces = [float(gram.trace()) for gram in grams]
        expected = sum(w * g / t for w, g, t in zip(weights, grams, traces, strict=True)) * (sum(traces) / 3)
        for given_traces in (None, traces):
            mixed = mix_grams(grams, weights=weights, traces=given_traces)
            assert torch.allclose(mixed, expected, rtol=1e-12)  # float64
        assert torch.allclose(mix_grams(grams, weights=[5, 3, 2]), expected, rtol=1e-12)

    def test_balanced_by_default_whatever_the_lengths(self) -> None:
        one, other = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 99.0]))
        assert torch.allclose(mix_grams([one, other]), torch.eye(2) * 25, rtol=1e-6)  # mean trace 50, half to each

    def test_one_source_is_unchanged_and_inputs_are_left_alone(self) -> None:
        gram = normal(4, 4, seed=22)
        before = gram.clone()
        assert torch.equal(mix_grams([gram], weights=[3.0]), gram)
        assert torch.equal(gram, before)

    def test_spread_parts_with_global_traces_sum_to_the_mixture(self) -> None:
        parts = [[torch.diag(normal(4, seed=10 * s + part).square()) for part in (0, 1)] for s in (1, 2)]
        whole = [sum(source) for source in parts]
        traces = [float(gram.trace()) for gram in whole]
        by_rank = [mix_grams([source[part] for source in parts], weights=[1, 2], traces=traces) for part in (0, 1)]
        assert torch.allclose(sum(by_rank), mix_grams(whole, weights=[1, 2]), rtol=1e-12)

    @pytest.mark.parametrize(
        ("grams", "arguments", "message"),
        [
            ([], {}, "no Grams"),
            ([torch.eye(2), torch.eye(3)], {}, "different shapes"),
            ([torch.eye(2)], {"weights": [1.0, 1.0]}, "one per source"),
            ([torch.eye(2)], {"traces": []}, "one per source"),
            ([torch.eye(2)] * 2, {"weights": [1.0, -1.0]}, "not negative"),
            ([torch.eye(2)] * 2, {"weights": [0.0, 0.0]}, "not all 0"),
            ([torch.zeros(2, 2)], {}, "traces"),
            ([torch.eye(2) * math.nan], {}, "traces"),
        ],
    )
    def test_bad_input_is_named(self, grams: list[Tensor], arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            mix_grams(grams, **arguments)


class TestTriangle:
    @settings(max_examples=40, deadline=None)
    @given(d=st.integers(0, 33), seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.float64]))
    def test_round_trip_is_exact(self, d: int, seed: int, dtype: torch.dtype) -> None:
        square = normal(d, d, seed=seed).to(dtype)
        gram = square + square.mT
        packed = pack_triangle(gram)
        assert packed.shape == (d * (d + 1) // 2,) and packed.is_contiguous() and packed.dtype == dtype
        assert torch.equal(unpack_triangle(packed), gram)
        # Every entry of the triangle once and nothing else: the sorted values are the same.
        row, column = torch.tril_indices(d, d)
        assert torch.equal(packed.sort().values, gram[row, column].sort().values)

    def test_sums_of_packed_are_packed_sums(self) -> None:
        grams = [normal(7, 7, seed=seed) for seed in (1, 2)]
        grams = [gram + gram.mT for gram in grams]
        assert torch.equal(unpack_triangle(pack_triangle(grams[0]) + pack_triangle(grams[1])), grams[0] + grams[1])

    def test_bad_input_is_named(self) -> None:
        with pytest.raises(ValueError, match="not square"):
            pack_triangle(torch.zeros(2, 3))
        with pytest.raises(ValueError, match="no packed triangle"):
            unpack_triangle(torch.zeros(4))


@settings(max_examples=25, deadline=None)
@given(d=st.integers(1, 12), tokens=st.integers(1, 20), seed=st.integers(0, 2**31), data=st.data())
def test_no_orthonormal_basis_leaks_less(d: int, tokens: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, d))
    activations = normal(tokens, d, seed=seed)
    gram = activations.mT @ activations
    found = null_basis(gram, rank=rank)
    assert_orthonormal(found.basis)
    # Ky Fan: the smallest eigenvectors minimise the trace. 1e-6: float32 storage of the basis.
    assert leak(gram, found.basis) <= random_leak(gram, rank=rank, seed=seed % 1000) + 1e-6
    assert leak(gram, found.basis) == pytest.approx(
        float(torch.linalg.eigvalsh(gram)[:rank].sum() / gram.trace()), abs=1e-6
    )
