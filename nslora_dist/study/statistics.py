"""The study's arithmetic on plain arrays: frontiers, areas, bands, rank correlations, bootstrap intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5% quantiles of Student's t with 1, 2, … degrees of freedom; of more, the last is a little too wide."""


LEAST_CLUSTERS = 8
"""Of fewer, drawn again, an interval says more of how they are drawn than of the figure."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval; None where nothing could be computed. ``share``: of resamples, that could."""

    value: float | None
    low: float | None
    high: float | None
    share: float = 1.0


def frontier(adaptation: Sequence[float], retention: Sequence[float]) -> list[tuple[float, float]]:
    """The points that no other beats in both, by falling adaptation: rising retention."""
    best, found = -np.inf, []
    for a, r in sorted(zip(adaptation, retention, strict=True), key=lambda point: (-point[0], -point[1])):
        if r > best:
            found.append((float(a), float(r)))
            best = r
    return found


def area_under_frontier(adaptation: Sequence[float], retention: Sequence[float]) -> float:
    """∫₀¹ (the most retention to be had at an adaptation of at least t) dt.

    1 is an adapter that learns all and loses nothing; what no point reaches counts as 0.
    """
    area, before = 0.0, 0.0
    for a, r in reversed(frontier(adaptation, retention)):  # by rising adaptation
        area += (a - before) * r
        before = a
    return area


def retention_at(adaptation: Array, retention: Array, *, target: float) -> float | None:
    """The most retention among settings that reach the target; None where none does."""
    reached = adaptation >= target - 1e-12
    return float(retention[reached].max()) if bool(reached.any()) else None


def over_seeds(values: Array, figure: Callable[[Array], float | None], *, most: float) -> Interval:
    """A figure of seed means, with Student's 95% interval over seeds by the jackknife.

    One seed at a time is left out, and the choice of a setting inside ``figure`` made anew, so that its luck is in the
    interval. A percentile bootstrap of three seeds would be their range, which holds the truth three times in four.

    Args:
        values: (seeds, ...); ``figure`` takes the mean over the first axis.
        figure: None where it cannot be computed; it lies in [0, ``most``], and the interval is cut to that.
        most: what the figure can come to.

    Returns:
        Without an interval where there is one seed, or where one was left out and the figure could not be computed.
    """
    value, count = figure(values.mean(0)), len(values)
    if count < 2:
        return Interval(value, None, None, float(value is not None))
    left = [figure(np.delete(values, seed, axis=0).mean(0)) for seed in range(count)]
    known = np.array([one for one in left if one is not None])
    if value is None or len(known) < count:
        return Interval(value, None, None, len(known) / count)
    error = float(np.sqrt((count - 1) / count * np.square(known - known.mean()).sum()))
    half = STUDENT[min(count - 2, len(STUDENT) - 1)] * error
    return Interval(value, max(0.0, value - half), max(value, min(most, value + half)))


def over_pairs(
    x: Sequence[float] | Array,
    y: Sequence[float] | Array,
    figure: Callable[[Array, Array], float | None],
    *,
    draws: int = 1000,
    seed: int = 0,
    clusters: Sequence[str] | None = None,
) -> Interval:
    """A figure of pairs, with the percentile interval over pairs drawn again, whole clusters at a time where given.

    Without an interval where there are fewer than ``LEAST_CLUSTERS`` of them.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    value = figure(a, b)
    names = [str(number) for number in range(len(a))] if clusters is None else list(clusters)
    members: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        members.setdefault(name, []).append(place)
    groups = [np.array(places) for places in members.values()]
    if len(groups) < LEAST_CLUSTERS:
        return Interval(value, None, None, float(value is not None))
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        chosen = np.concatenate([groups[number] for number in rng.integers(len(groups), size=len(groups))])
        drawn.append(figure(a[chosen], b[chosen]))
    return _interval(value, drawn)


def _interval(value: float | None, drawn: Sequence[float | None]) -> Interval:
    known = [one for one in drawn if one is not None]
    if not known:
        return Interval(value, None, None, 0.0)
    low, high = np.percentile(known, [2.5, 97.5])
    return Interval(value, float(low), float(high), len(known) / len(drawn))


def ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Array = last - (counts - 1) / 2
    return mean[inverse]


def spearman(x: Array, y: Array) -> float | None:
    """Rank correlation; None with fewer than three pairs, or where one side never changes."""
    if len(x) < 3:
        return None
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale > 0 else None


def safe_below(interference: Array, forgetting: Array, *, lost: float, allowed: float) -> float | None:
    """The largest interference at which at most a share ``allowed`` of cells loses more than ``lost``.

    The share is isotonic regression's: the best fit to the cells that never falls as interference grows. A share of
    *all* cells below would depend on how many harmless ones a grid happens to have.

    Args:
        interference: (cells,).
        forgetting: (cells,).
        lost: forgetting above this is a loss.
        allowed: share; 0 asks for the last value before the first loss.

    Returns:
        One of the interferences seen; None where the lowest one loses already, or there are no cells.
    """
    order = np.argsort(interference, kind="stable")
    values = interference[order]
    # Isotonic regression is at most a up to where the sum of (loss - a) is least: at the last such place, for ties.
    sums = np.cumsum((forgetting[order] > lost) - allowed)
    ends = np.append(values[1:] > values[:-1], True)[: len(values)]  # equal values stand or fall together
    sums, values = np.append(0.0, sums[ends]), values[ends]
    least = int(np.flatnonzero(sums <= sums.min() + 1e-9)[-1])
    return float(values[least - 1]) if least else None


def safe_band(
    rates: Sequence[float], adaptation: Array, retention: Array, *, learns: float, keeps: float
) -> tuple[float, bool]:
    """The longest stretch of learning rates, in decades, in which a method both learns and keeps.

    Between the rates that were run, both curves are straight over the logarithm of the rate.

    Args:
        rates: ascending.
        adaptation: (rates,).
        retention: (rates,).
        learns: least adaptation.
        keeps: least retention.

    Returns:
        Its length, and whether both its ends were seen: at the last rate that was run it may go on.
    """
    at = np.log10(np.asarray(rates, dtype=np.float64))
    fine = np.linspace(at[0], at[-1], 4001) if len(at) > 1 else at
    good = (np.interp(fine, at, adaptation) >= learns - 1e-9) & (np.interp(fine, at, retention) >= keeps - 1e-9)
    longest, ends, start = 0.0, True, None
    for place, one in enumerate([*good.tolist(), False]):
        if one and start is None:
            start = place
        if not one and start is not None:
            length = float(fine[place - 1] - fine[start])
            if length > longest:
                longest, ends = length, start > 0 and place < len(fine)
            start = None
    return longest, ends
