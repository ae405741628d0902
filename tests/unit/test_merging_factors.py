"""Merging in the factors against dense float64 references: sums, compression, Grams, TIES and DARE."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from helpers.merge_world import dense
from nslora_dist.errors import UserError
from nslora_dist.export import Factors
from nslora_dist.merging import updates
from nslora_dist.merging.factors import add, compress, concatenate
from nslora_dist.merging.gram import merge_by_grams
from nslora_dist.merging.updates import LowRankUpdate, SparseUpdate, Trim, chance_mask, low_rank, threshold

D_OUT, D_IN = 23, 17


def pair(rank: int, seed: int, *, a: Tensor | None = None) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rank, D_IN, generator=generator)
    return Factors(made if a is None else a, torch.randn(D_OUT, rank, generator=generator))


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def whole(update: updates.Update) -> Tensor:
    return torch.cat([block for _, block in update.blocks()]).double()


def test_sums_of_mixed_ranks_are_exact() -> None:
    pairs, coefficients = [pair(3, 0), pair(5, 1), pair(1, 2)], [0.4, -1.5, 2.0]
    wanted = sum(c * dense(p) for c, p in zip(coefficients, pairs, strict=True))
    for made in (add(pairs, coefficients), concatenate(pairs, coefficients)):
        assert made.rank == 9
        close(dense(made), wanted)  # type: ignore[arg-type]


def test_equal_down_projections_are_kept_once() -> None:
    first = pair(4, 0)
    pairs = [first, pair(4, 1, a=first.lora_a.clone()), pair(2, 2)]
    made = add(pairs, [1.0, 2.0, 3.0])
    assert made.rank == 6
    close(dense(made), dense(pairs[0]) + 2 * dense(pairs[1]) + 3 * dense(pairs[2]))
    assert add(pairs[:2], [0.5, 0.5]).rank == 4
    assert concatenate(pairs[:2], [0.5, 0.5]).rank == 8


def test_one_coefficient_for_each() -> None:
    for merge in (add, concatenate):
        with pytest.raises(ValueError, match="2 updates, 1 coefficients"):
            merge([pair(2, 0), pair(2, 1)], [1.0])


@pytest.mark.parametrize("rank", [1, 4, 8, 30])
def test_compression_is_the_truncated_svd(rank: int) -> None:
    long = concatenate([pair(8, 0), pair(12, 1)], [1.0, 0.3])  # of rank 20, above d_in
    made, error = compress(long, rank)
    u, s, vt = torch.linalg.svd(dense(long), full_matrices=False)
    keep = min(rank, D_IN)
    close(dense(made), u[:, :keep] @ torch.diag(s[:keep]) @ vt[:keep])
    assert made.rank == keep
    assert error == pytest.approx(float((s[keep:].square().sum() / s.square().sum()).sqrt()), abs=1e-7)


def test_compressing_nothing_gives_nothing() -> None:
    made, error = compress(Factors(torch.randn(2, D_IN), torch.zeros(D_OUT, 2)), 1)
    assert error == 0.0 and not dense(made).any()


def activations(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(D_IN, count, generator=generator, dtype=torch.float64)


def gram_of(p: Factors, x: Tensor) -> Tensor:
    z = p.lora_a.double() @ x
    return z @ z.T


def disagreement(merged: Tensor, pairs: list[Factors], xs: list[Tensor]) -> float:
    """Σ_k ‖(ΔW − ΔW_k) X_k‖²."""
    return sum(float(((merged - dense(p)) @ x).square().sum()) for p, x in zip(pairs, xs, strict=True))


def test_gram_merge_of_a_shared_a_is_the_best_there_is() -> None:
    first = pair(4, 0)
    pairs = [first, pair(4, 1, a=first.lora_a), pair(4, 2, a=first.lora_a)]
    xs = [torch.diag(torch.rand(D_IN, dtype=torch.float64).add(0.05)) @ activations(40, k) for k in range(3)]
    made = merge_by_grams(pairs, [gram_of(p, x) for p, x in zip(pairs, xs, strict=True)], [1.0] * 3)
    assert made.rank == 4
    best = disagreement(dense(made), pairs, xs)
    for coefficients in ([1.0] * 3, [1 / 3] * 3, [0.4] * 3):
        assert best < 0.999 * disagreement(dense(add(pairs, coefficients)), pairs, xs)
    generator = torch.Generator().manual_seed(9)
    for _ in range(20):  # a minimum: every step in B away from it is worse
        step = 1e-2 * torch.randn(made.lora_b.shape, generator=generator)
        moved = Factors(made.lora_a, made.lora_b + step)
        assert disagreement(dense(moved), pairs, xs) > best


@pytest.mark.parametrize("tokens", [40, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_gram_merge_with_itself_changes_nothing(tokens: int, shared: bool) -> None:
    """Also where the Gram is singular: two tokens say nothing about the other directions."""
    one = pair(4, 0)
    mixing = (
        torch.eye(4) if shared else torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) + 3 * torch.eye(4)
    )
    other = Factors(mixing @ one.lora_a, one.lora_b @ torch.linalg.inv(mixing))  # the same ΔW in other coordinates
    x = activations(tokens, 3)
    made = merge_by_grams([one, other], [gram_of(one, x), gram_of(other, x)], [1.0, 1.0])
    assert made.rank == 4
    close(dense(made), dense(one), 1e-4)


def test_gram_merge_of_different_a_against_its_definition() -> None:
    """The least-squares problem of the docstring, solved densely."""
    pairs, weights = [pair(3, 0), pair(4, 1), pair(2, 2)], [1.0, 0.5, 2.0]
    overlap = pairs[1].lora_a.clone()
    overlap[:2] = pairs[0].lora_a[:2] + 0.3 * overlap[:2]
    overlap[3] = pairs[0].lora_a[2]  # one direction in common: 8 instead of 9
    pairs[1] = Factors(overlap, pairs[1].lora_b)
    xs = [activations(60, k) for k in range(3)]
    grams = [gram_of(p, x) for p, x in zip(pairs, xs, strict=True)]
    made = merge_by_grams(pairs, grams, weights)
    assert made.rank == 8
    stacked = torch.cat([p.lora_a for p in pairs]).double()
    every = torch.linalg.pinv(stacked, rtol=1e-9) @ stacked
    roots = []
    for p, gram, weight in zip(pairs, grams, weights, strict=True):
        back = torch.linalg.pinv(p.lora_a.double())
        own = back @ p.lora_a.double()
        known = back @ gram @ back.T  # (d_in, d_in), of rank r
        whole = known + torch.trace(known) / p.rank * (every - own)
        close(p.lora_a.double() @ whole @ p.lora_a.double().T, gram)
        values, vectors = torch.linalg.eigh(whole)
        roots.append((weight * values.clamp_min(0.0)).sqrt() * vectors)
    x = torch.cat(roots, dim=1)  # its columns stand for the activations
    y = torch.cat([dense(p) @ root for p, root in zip(pairs, roots, strict=True)], dim=1)
    # Of eigenvalues that are zero but for rounding the roots are 1e-8.
    wanted = torch.linalg.lstsq(x.T, y.T, driver="gelsd", rcond=1e-6).solution.T
    close(dense(made), wanted, 1e-3)


@pytest.mark.parametrize("apart", [0.3, 0.03, 1e-4])
def test_gram_merge_of_nearly_equal_a_is_near_that_of_equal_ones(apart: float) -> None:
    """Two trainings from one seed: their small difference must not be amplified."""
    first = pair(4, 0)
    pairs = [pair(4, k, a=first.lora_a + apart * pair(4, 10 + k).lora_a) for k in range(2)]
    xs = [activations(60, k) for k in range(2)]
    grams = [gram_of(p, x) for p, x in zip(pairs, xs, strict=True)]
    made, mean = dense(merge_by_grams(pairs, grams, [1.0, 1.0])), dense(add(pairs, [0.5, 0.5]))
    assert disagreement(made, pairs, xs) < 1.05 * disagreement(mean, pairs, xs)
    assert made.norm() < 1.5 * mean.norm()
    if apart < 1e-3:
        equal = [Factors(first.lora_a, p.lora_b) for p in pairs]
        exact = merge_by_grams(equal, [gram_of(p, x) for p, x in zip(equal, xs, strict=True)], [1.0, 1.0])
        close(made, dense(exact), 1e-2)


def test_gram_merge_of_unlike_scales_is_the_same() -> None:
    """A small A with a large B is the same update; a null-space A may be tiny."""
    pairs, xs = [pair(4, 0), pair(3, 1)], [activations(30, k) for k in range(2)]
    grams = [gram_of(p, x) for p, x in zip(pairs, xs, strict=True)]
    scaled = [pairs[0], Factors(1e-9 * pairs[1].lora_a, 1e9 * pairs[1].lora_b)]
    made = merge_by_grams(scaled, [grams[0], 1e-18 * grams[1]], [1.0, 1.0])
    assert made.rank == 7
    close(dense(made), dense(merge_by_grams(pairs, grams, [1.0, 1.0])), 1e-4)


def test_rounding_in_a_stored_gram_is_not_taken_for_energy() -> None:
    """Three tokens say nothing of five of eight directions, in which a float32 Gram holds rounding of either sign."""
    first = pair(8, 0)
    pairs = [first, pair(8, 1, a=first.lora_a)]
    xs = [activations(3, k) for k in (5, 5)]
    exact = [gram_of(p, x) for p, x in zip(pairs, xs, strict=True)]
    noise = [torch.randn(8, 8, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(2)]
    stored = [(c + 3e-8 * float(c.norm()) * (n + n.T) / 2).float() for c, n in zip(exact, noise, strict=True)]
    made = dense(merge_by_grams(pairs, stored, [1.0, 1.0]))
    close(made, dense(merge_by_grams(pairs, exact, [1.0, 1.0])), 1e-3)
    close(made, dense(add(pairs, [0.5, 0.5])), 1e-3)  # the same tokens weigh both alike


def test_gram_merge_refuses_what_does_not_fit() -> None:
    pairs = [pair(3, 0), pair(3, 1)]
    grams = [torch.eye(3), torch.eye(3)]
    with pytest.raises(ValueError, match="rank x rank"):
        merge_by_grams(pairs, [torch.eye(3), torch.eye(4)], [1.0, 1.0])
    with pytest.raises(ValueError, match="positive"):
        merge_by_grams(pairs, grams, [1.0, -1.0])
    with pytest.raises(ValueError, match="2 updates, 1 Grams"):
        merge_by_grams(pairs, grams[:1], [1.0, 1.0])


def ties_reference(deltas: list[Tensor]) -> Tensor:
    """Elect the sign of the sum, then the mean of those that have it; entry by entry, in plain Python."""
    found = torch.zeros_like(deltas[0])
    for i in range(found.shape[0]):
        for j in range(found.shape[1]):
            values = [float(d[i, j]) for d in deltas]
            agreeing = [v for v in values if v * sum(values) > 0]
            found[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return found


def trimmed(delta: Tensor, density: float) -> Tensor:
    flat = delta.flatten()
    kept = torch.zeros_like(flat)
    chosen = flat.abs().topk(int(density * flat.numel())).indices
    kept[chosen] = flat[chosen]
    return kept.view(delta.shape)


@pytest.mark.parametrize("block_values", [2**22, 3 * D_IN + 1])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_ties_against_dense(monkeypatch: pytest.MonkeyPatch, block_values: int, density: float) -> None:
    monkeypatch.setattr(updates, "BLOCK_VALUES", block_values)
    pairs, coefficients = [pair(3, 0), pair(5, 1), pair(2, 2)], [1.0, 0.7, 1.3]
    update = SparseUpdate("m", ["a", "b", "c"], pairs, coefficients, density, False, 0)
    parts = [c * trimmed(whole(LowRankUpdate(p)), density) for c, p in zip(coefficients, pairs, strict=True)]
    close(whole(update), ties_reference(parts))
    assert torch.equal(whole(update), whole(update))


@pytest.mark.parametrize("keep", [1, 7, 100, D_OUT * D_IN])
def test_exactly_as_many_entries_stay_as_were_asked_for(monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    """Whole numbers, so that many magnitudes are equal."""
    monkeypatch.setattr(updates, "BLOCK_VALUES", 4 * D_IN)
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-2, 3, (2, D_IN), generator=generator).float()
    update = LowRankUpdate(Factors(a, torch.randint(-2, 3, (D_OUT, 2), generator=generator).float()))
    trim = Trim(*threshold(update, keep))
    masks = torch.cat([trim.mask(block) for _, block in update.blocks()])
    values = whole(update).abs()
    assert int(masks.sum()) == keep
    assert keep == masks.numel() or float(values[masks].min()) >= float(values[~masks].max())


def test_dare_against_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "BLOCK_VALUES", 5 * D_IN)
    pairs, names, density = [pair(3, 0), pair(5, 1)], ["a", "b"], 0.6

    def masked(name: str, p: Factors) -> Tensor:
        rows = range(0, D_OUT, 5)
        masks = [chance_mask((min(5, D_OUT - r), D_IN), density, f"7/{name}/m/{r}") for r in rows]
        return dense(p) * torch.cat(masks) / density

    wanted = ties_reference([2.0 * masked("a", pairs[0]), 0.5 * masked("b", pairs[1])])
    found = whole(SparseUpdate("m", names, pairs, [2.0, 0.5], density, True, 7))
    close(found, wanted)
    others = [SparseUpdate("m", names, pairs, [2.0, 0.5], density, True, 8)]
    others += [SparseUpdate("n", names, pairs, [2.0, 0.5], density, True, 7)]
    assert all(not torch.equal(found, whole(other)) for other in others)


def test_chance_keeps_the_share_it_should_independently() -> None:
    one, two = (chance_mask((300, 300), 0.3, seed) for seed in ("0/a/m/0", "0/b/m/0"))
    assert torch.equal(one, chance_mask((300, 300), 0.3, "0/a/m/0"))
    assert float(one.float().mean()) == pytest.approx(0.3, abs=0.01)  # six standard deviations
    assert float((one & two).float().mean()) == pytest.approx(0.09, abs=0.007)


def test_streamed_svd_is_close_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "BLOCK_VALUES", 3 * D_IN)
    pairs = [pair(3, 0), pair(5, 1)]
    sparse = SparseUpdate("m", ["a", "b"], pairs, [1.0, 1.0], 0.3, False, 0)
    s = torch.linalg.svdvals(whole(sparse))
    made, error = low_rank(sparse, 4, seed="0")
    best = float((s[4:].square().sum() / s.square().sum()).sqrt())
    assert made.rank == 4
    assert error == pytest.approx(float((whole(sparse) - dense(made)).norm() / s.norm()), rel=1e-3)
    assert best * 0.9999 <= error < 1.01 * best
    exact, error = low_rank(LowRankUpdate(pairs[1]), 6, seed="0")
    close(dense(exact), dense(pairs[1]))
    assert error < 1e-3


class Dense:
    def __init__(self, values: Tensor) -> None:
        self.values, self.reads = values, 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        self.reads += 1
        for start in range(0, len(self.values), 50):
            yield start, self.values[start : start + 50]


def test_a_flat_spectrum_takes_power_steps() -> None:
    """Noise, as trimming makes it: without the steps two thirds of the best's energy are found, with them 0.955."""
    update = Dense(torch.randn(200, 150, generator=torch.Generator().manual_seed(0)))
    best = torch.linalg.svdvals(update.values.double())[:4].square().sum()
    found, _ = low_rank(update, 4, seed="0")
    assert dense(found).square().sum() > 0.94 * best
    assert update.reads == 8


def test_thresholds_are_searched_once_for_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    monkeypatch.setattr(updates, "threshold", lambda update, keep: searched.append(keep) or threshold(update, keep))
    low_rank(SparseUpdate("m", ["a", "b"], [pair(3, 0), pair(5, 1)], [1.0, 1.0], 0.3, False, 0), 4, seed="0")
    assert searched == [int(0.3 * D_OUT * D_IN)] * 2


def test_an_update_that_overflows_is_said() -> None:
    huge = SparseUpdate("m", ["a", "b"], [pair(3, 0), pair(3, 0)], [1e38, 1e38], 0.2, False, 0)
    with pytest.raises(UserError, match="not finite; lower the adapters' coefficients"):
        low_rank(huge, 2, seed="0")


def test_sparse_update_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="density"):
        SparseUpdate("m", ["a"], [pair(2, 0)], [1.0], 0.0, False, 0)
    with pytest.raises(ValueError, match="2 updates, 1"):
        SparseUpdate("m", ["a", "b"], [pair(2, 0), pair(2, 1)], [1.0], 0.5, False, 0)
