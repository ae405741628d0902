"""The study's arithmetic against slower or other ways to the same numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nslora_dist.study.statistics import (
    area_under_frontier,
    frontier,
    over_pairs,
    over_seeds,
    ranks,
    retention_at,
    safe_band,
    safe_below,
    spearman,
)

shares = st.integers(0, 50).map(lambda n: n / 50)
points = st.lists(st.tuples(shares, shares), min_size=1, max_size=12)


@given(points)
def test_area_is_the_integral_of_what_can_be_kept(drawn: list[tuple[float, float]]) -> None:
    a, r = zip(*drawn, strict=True)
    # All steps are at multiples of 1/50, so that the middle of each cell has the cell's value.
    middles = [(k + 0.5) / 50 for k in range(50)]
    slow = sum(max((y for x, y in drawn if x >= t), default=0.0) for t in middles) / 50
    assert area_under_frontier(a, r) == pytest.approx(slow)


@given(points)
def test_no_point_beats_one_of_the_frontier(drawn: list[tuple[float, float]]) -> None:
    a, r = zip(*drawn, strict=True)
    kept = frontier(a, r)
    assert set(kept) <= set(drawn)
    for x, y in drawn:
        assert any(fx >= x and fy >= y for fx, fy in kept)
    assert not [p for p in kept for q in kept if p != q and q[0] >= p[0] and q[1] >= p[1]]


def test_retention_at_takes_the_best_that_reaches_the_target() -> None:
    a, r = np.array([0.2, 0.95, 0.97]), np.array([1.0, 0.4, 0.6])
    assert retention_at(a, r, target=0.95) == 0.6
    assert retention_at(a, r, target=0.1) == 1.0
    assert retention_at(a, r, target=0.98) is None


def test_ranks_share_ties() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=20))
def test_spearman_is_the_correlation_of_ranks(pairs: list[tuple[int, int]]) -> None:
    x, y = (np.array(values, dtype=float) for values in zip(*pairs, strict=True))
    found = spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found is None
        return
    assert found == pytest.approx(float(np.corrcoef(ranks(x), ranks(y))[0, 1]))
    assert found == pytest.approx(spearman(np.exp(x), y**3))  # only the order counts


def test_safe_below_ends_before_the_first_loss_or_where_losses_are_few() -> None:
    x = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    y = np.array([0.0, 0.0, 0.5, 0.0, 0.5])
    assert safe_below(x, y, lost=0.01, allowed=0.0) == 0.2
    assert safe_below(x, y, lost=0.01, allowed=0.25) == 0.2
    assert safe_below(x, y, lost=0.01, allowed=0.5) == 0.4  # one loss in the two that come after
    assert safe_below(x, y, lost=0.6, allowed=0.0) == 0.5
    assert safe_below(x, y - 1 + 2, lost=0.01, allowed=0.0) is None
    # Of two cells with one interference, of which one loses, neither is safe.
    assert safe_below(np.array([0.1, 0.2, 0.2]), np.array([0.0, 0.0, 1.0]), lost=0.01, allowed=0.0) == 0.1


def test_safe_below_does_not_depend_on_how_many_harmless_cells_there_are() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0.0, 1.0, 4000)
    y = (rng.uniform(0.0, 1.0, 4000) < np.clip(x - 0.5, 0.0, 1.0)).astype(float)  # one loss in twenty at 0.55
    more = np.concatenate([x, rng.uniform(0.0, 0.1, 20000)])
    alone, many = (safe_below(a, np.append(y, np.zeros(len(a) - len(y))), lost=0.01, allowed=0.05) for a in (x, more))
    assert alone == many and alone == pytest.approx(0.55, abs=0.04)


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=14))
def test_safe_below_is_isotonic_regressions(pairs: list[tuple[int, bool]]) -> None:
    """By its other definition: the fit at v is the largest, over starts up to v, of the least mean from there on."""
    x, y = np.array([float(a) for a, _ in pairs]), np.array([float(b) for _, b in pairs])
    at = np.unique(x)

    def fit(v: float) -> float:
        return max(min(y[(x >= a) & (x <= b)].mean() for b in at if b >= v) for a in at if a <= v)

    for allowed in (0.0, 0.3, 0.5):
        safe = [v for v in at if fit(v) <= allowed + 1e-12]
        assert safe_below(x, y, lost=0.5, allowed=allowed) == (safe[-1] if safe else None)


def test_safe_band_is_the_longest_stretch_in_decades() -> None:
    rates = [1e-4, 1e-3, 1e-2, 1e-1]
    whole = safe_band(rates, np.ones(4), np.ones(4), learns=0.9, keeps=0.9)
    assert whole == (pytest.approx(3.0), False)  # it may go on at both ends
    # Learns from the middle of the first decade on, keeps to the middle of the last.
    half = safe_band(rates, np.array([0, 1, 1, 1.0]), np.array([1, 1, 1, 0.0]), learns=0.5, keeps=0.5)
    assert half == (pytest.approx(2.0, abs=2e-3), True)
    upper = safe_band(rates, np.array([1, 0, 1, 1.0]), np.ones(4), learns=0.5, keeps=0.5)
    assert upper == (pytest.approx(1.5, abs=2e-3), False)
    assert safe_band(rates, np.zeros(4), np.ones(4), learns=0.5, keeps=0.5) == (0.0, True)
    assert safe_band([1e-3], np.ones(1), np.ones(1), learns=0.5, keeps=0.5)[0] == 0.0


def test_intervals_of_a_mean_over_seeds_are_students() -> None:
    values = np.array([0.2, 0.5, 0.9, 0.4])
    found = over_seeds(values[:, None], lambda mean: float(mean[0]), most=9.0)
    half = 3.182 * values.std(ddof=1) / 2  # t of three degrees of freedom; the root of four
    assert found.value == pytest.approx(0.5)
    assert (found.low, found.high) == (pytest.approx(max(0.0, 0.5 - half)), pytest.approx(0.5 + half))
    alone = over_seeds(values[:1, None], lambda mean: float(mean[0]), most=9.0)
    assert (alone.value, alone.low, alone.high) == (0.2, None, None)


def test_intervals_over_seeds_hold_the_truth_as_often_as_they_say() -> None:
    rng, hits, draws = np.random.default_rng(0), 0, 600
    for _ in range(draws):
        found = over_seeds(rng.normal(5.0, 0.3, (3, 1)), lambda mean: float(mean[0]), most=9.0)
        assert found.low is not None and found.high is not None
        hits += found.low <= 5.0 <= found.high
    assert hits / draws == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / draws) ** 0.5)  # four standard errors


def test_intervals_over_seeds_choose_anew() -> None:
    # Setting 0 is best for one seed, setting 1 for the other two: left out, the first seed changes the choice.
    values = np.array([[0.9, 0.1], [0.2, 0.5], [0.2, 0.5]])
    found = over_seeds(values, lambda mean: float(mean.max()), most=9.0)
    left = np.array([0.5, 0.55, 0.55])
    half = 4.303 * np.sqrt(2 / 3 * np.square(left - left.mean()).sum())
    assert found.value == pytest.approx(1.3 / 3)
    assert (found.low, found.high) == (pytest.approx(1.3 / 3 - half), pytest.approx(1.3 / 3 + half))


def test_intervals_over_seeds_stay_among_what_can_be() -> None:
    # One seed of three forgets: Student's half width is 2, and a share of what was known is from 0 to 1.
    wide = over_seeds(np.array([[0.9], [0.95], [0.2]]), lambda mean: float(mean[0]), most=1.0)
    assert wide.value == pytest.approx(2.05 / 3) and (wide.low, wide.high) == (0.0, 1.0)
    # A base's score may come out otherwise on another processor: what was seen is never outside.
    above = over_seeds(np.array([[1.01], [1.02], [1.03]]), lambda mean: float(mean[0]), most=1.0)
    assert above.low is not None and above.low < 1.02 and above.high == pytest.approx(1.02)


def test_intervals_over_seeds_say_how_often_there_was_none() -> None:
    found = over_seeds(np.array([[0.0], [1.0], [1.0]]), lambda mean: 1.0 if mean[0] > 0.6 else None, most=1.0)
    assert found.value == 1.0 and found.low is None
    assert found.share == pytest.approx(1 / 3)  # either of the others left out, it is a half


def test_intervals_over_clusters_are_wider_than_over_pairs_that_repeat() -> None:
    rng = np.random.default_rng(0)
    x, y = np.repeat(rng.normal(size=8), 10), np.repeat(rng.normal(size=8), 10)
    names = [f"{number}" for number in np.repeat(np.arange(8), 10)]
    alone = over_pairs(x.tolist(), y.tolist(), spearman, draws=300)
    together = over_pairs(x.tolist(), y.tolist(), spearman, draws=300, clusters=names)
    assert alone.value == together.value
    assert alone.low is not None and alone.high is not None and together.low is not None and together.high is not None
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
    assert not math.isnan(together.low)
    few = over_pairs(x.tolist(), y.tolist(), spearman, draws=300, clusters=[f"{number % 7}" for number in range(80)])
    assert few.value == alone.value and few.low is None, "seven clusters"
