"""The budget against dense float64: any cut of B over ranks, any C; B is scaled exactly as far as it has to be."""

import math
import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.ranks import run_ranks
from nslora_dist import dist
from nslora_dist.adapter import AdaptedLinear
from nslora_dist.budget import Budget, cut, rounded_down, scale_factors, split_rows
from nslora_dist.calibration.store import MIXTURE
from nslora_dist.engines.base import Shard
from nslora_dist.errors import UserError
from nslora_dist.recipe_adapter import AdapterSection

CPU = torch.device("cpu")
RANK, SCALE = 5, 1.5
HEIGHTS = {"a": 7, "b": 16, "c": 1, "d": 33}


class Flat:
    """What the budget asks of an engine, each B dealt in runs of elements that end anywhere."""

    def __init__(self, values: dict[str, Tensor], ends: Mapping[str, Sequence[int]], seed: int = 0) -> None:
        """``ends`` are a module's cut points, one between two ranks."""
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Module()
        self.values, self.ends, self.scaled = {n: v.clone() for n, v in values.items()}, ends, 0
        for name, value in values.items():
            shapes = {"in_features": 3, "out_features": len(value), "rank": RANK, "scale": SCALE}
            made = AdaptedLinear(nn.Identity(), name=name, freeze_a=True, residual=False, dtype=torch.float32, **shapes)
            root = torch.randn(RANK, RANK, generator=generator) * torch.logspace(0, -2, RANK)
            made.update_grams = {MIXTURE: root @ root.T, "other": torch.eye(RANK)}
            made.references = {MIXTURE: 10.0 * len(value), "other": 1.0}
            self.model.add_module(name, made)

    def run(self, name: str) -> slice:
        bounds = [0, *self.ends[name], self.values[name].numel()]
        return slice(bounds[dist.rank()], bounds[dist.rank() + 1])

    def shards(self, *, moments: bool = True) -> list[Shard]:
        assert not moments
        parts = {name: value.view(-1)[self.run(name)] for name, value in self.values.items()}
        found = [
            Shard(f"{n}.lora_B", tuple(self.values[n].shape), self.run(n).start, {"value": parts[n]}) for n in parts
        ]
        return [Shard("a.lora_A", (RANK, 3), 0, {"value": torch.ones(15)}), *found]

    def masters(self, names: Sequence[str]) -> list[Tensor]:
        return [self.values[n].view(-1)[self.run(n)] for n in (name.removesuffix(".lora_B") for name in names)]

    def scale(self, factors: Mapping[str, float]) -> None:
        self.scaled += 1
        for name, factor in factors.items():
            module = name.removesuffix(".lora_B")
            self.values[module].view(-1)[self.run(module)] *= factor

    def dense(self) -> dict[str, float]:
        """In float64 and whole."""
        found = {}
        for name, value in self.values.items():
            module: Any = self.model.get_submodule(name)
            b = SCALE * value.double()
            energy = torch.einsum("ij,jk,ik->", b, module.update_grams[MIXTURE].double(), b)
            found[name] = math.sqrt(float(energy) / module.references[MIXTURE])
        return found


def random_values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(height, RANK, generator=generator) * 10.0 ** -(number % 3)
        for number, (name, height) in enumerate(HEIGHTS.items())
    }


def budget(engine: Flat, limit: float, over: Any = "module") -> Budget:
    return Budget(engine, limit=limit, over=over, device=CPU)  # type: ignore[arg-type]


def random_cuts(seed: int, ranks: int) -> dict[str, list[int]]:
    dice = random.Random(seed)
    return {name: sorted(dice.randint(0, rows * RANK) for _ in range(ranks - 1)) for name, rows in HEIGHTS.items()}


def one_rank(values: dict[str, Tensor]) -> Flat:
    return Flat(values, {name: [] for name in values})


def rms(values: dict[str, float]) -> float:
    return math.sqrt(sum(value**2 for value in values.values()) / len(values))


@pytest.mark.parametrize("seed", range(5))
def test_every_module_above_it_is_put_on_it(seed: int) -> None:
    engine = one_rank(random_values(seed))
    before, values = engine.dense(), {name: value.clone() for name, value in engine.values.items()}
    limit = sorted(before.values())[1] * 1.0001
    kept = budget(engine, limit).enforce()
    after = engine.dense()
    assert len(kept.factors) == 2
    for name, was in before.items():
        if was <= limit:
            assert torch.equal(engine.values[name], values[name])
        else:
            assert limit * (1 - 1e-6) < after[name] <= limit * (1 + 1e-6)
            torch.testing.assert_close(engine.values[name], values[name] * (limit / was), rtol=1e-6, atol=0)
        assert kept.interference[name] == pytest.approx(after[name], rel=1e-6)
    assert kept.value == pytest.approx(limit, rel=1e-6)
    assert kept.tags()["interference_budget/share_of_modules_scaled"] == 0.5
    assert kept.tags()["interference_budget/smallest_factor"] == pytest.approx(limit / max(before.values()), rel=1e-6)
    assert budget(engine, limit).facts() == {"limit": limit, "over": "module", "final": pytest.approx(limit, rel=1e-6)}


@pytest.mark.parametrize("seed", range(5))
def test_in_total_all_are_scaled_alike(seed: int) -> None:
    engine = one_rank(random_values(seed))
    before = engine.dense()
    limit = 0.7 * rms(before)
    kept = budget(engine, limit, "total").enforce()
    assert limit * (1 - 1e-6) < rms(engine.dense()) <= limit * (1 + 1e-6)
    assert kept.value == pytest.approx(limit, rel=1e-6)
    assert set(kept.factors) == set(before) and len(set(kept.factors.values())) == 1
    assert {n: v / before[n] for n, v in engine.dense().items()} == pytest.approx(dict.fromkeys(before, 0.7), rel=1e-5)


@pytest.mark.parametrize("over", ["module", "total"])
def test_within_the_budget_nothing_is_touched(over: str) -> None:
    values = random_values(0)
    zero = {name: torch.zeros_like(value) for name, value in values.items()}
    for given, limit in ((values, 1e3), (zero, 1e-6)):
        engine = one_rank(given)
        kept = budget(engine, limit, over).enforce()
        assert engine.scaled == 0 and kept.factors == {} and kept.interference == pytest.approx(engine.dense())
        assert kept.tags()["interference_budget/smallest_factor"] == 1.0
        assert all(torch.equal(value, given[name]) for name, value in engine.values.items())


def _on_ranks(seeds: Sequence[int], ranks: int) -> list[dict[str, Any]]:
    found = []
    for seed in seeds:
        for over in ("module", "total"):
            engine = Flat(random_values(seed), random_cuts(seed, ranks))
            dense = engine.dense()
            kept = budget(engine, 0.5 * max(dense.values()), over)
            measured, factors = kept.measure(), kept.enforce().factors
            mine = {name: value.view(-1)[engine.run(name)].clone() for name, value in engine.values.items()}
            found.append({"dense": dense, "measured": measured, "factors": factors, "mine": mine, "cut": kept.split})
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_parts_of_rows_find_the_same_factors(ranks: int) -> None:
    """ZeRO-3's runs of elements, cut at random: inside rows, twice in one row, at the ends, empty."""
    seeds = range(6)
    everyone = run_ranks(_on_ranks, ranks, seeds, ranks, timeout=100)
    for number, cases in enumerate(zip(*everyone, strict=True)):
        first, whole = cases[0], one_rank(random_values(seeds[number // 2]))
        assert first["cut"] and first["factors"]
        assert all(case["factors"] == first["factors"] and case["measured"] == first["measured"] for case in cases)
        assert first["measured"] == pytest.approx(first["dense"], rel=1e-9)
        limit = 0.5 * max(first["dense"].values())
        alone = budget(whole, limit, "total" if number % 2 else "module").enforce().factors
        assert first["factors"] == pytest.approx(alone, rel=1e-7)
        for name, value in whole.values.items():
            parts = torch.cat([case["mine"][name] for case in cases]).view(value.shape)
            torch.testing.assert_close(parts, value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [1, 3, 5])
def test_a_run_is_cut_into_whole_rows_and_parts(width: int) -> None:
    for start in range(4 * width):
        for count in range(4 * width - start + 1):
            rows, parts = cut(start, count, width)
            seen = list(range(start, start + count))[rows]
            assert len(seen) % width == 0 and (not seen or seen[0] % width == 0)
            for row, column, part in parts:
                elements = list(range(start, start + count))[part]
                assert 0 < len(elements) < width and elements[0] == row * width + column
                assert elements[-1] < (row + 1) * width
                seen += elements
            assert sorted(seen) == list(range(start, start + count))


def test_rows_that_one_rank_has_whole_are_not_exchanged() -> None:
    shapes = [(4, 3), (2, 3)]
    assert split_rows(shapes, [[(0, 6), (0, 3)], [(6, 6), (3, 3)]]) == {}
    assert split_rows(shapes, [[(0, 7), (0, 1)], [(7, 5), (1, 1)], [(12, 0), (2, 4)]]) == {(0, 2): 0, (1, 0): 1}


def test_a_factor_is_never_rounded_up() -> None:
    values = np.random.default_rng(0).random(200)
    near = rounded_down(values)
    assert near.dtype == np.float32
    assert (near <= values).all() and (near >= values * (1 - 2**-23)).all() and (near < values).any()


def test_what_is_not_finite_is_left_to_the_next_loss() -> None:
    found = {"a": math.nan, "b": math.inf, "c": 2.0}
    assert scale_factors(found, limit=1.0, over="module") == {"c": 0.5}
    assert scale_factors(found, limit=1.0, over="total") == {}


def test_no_budget_and_no_reference() -> None:
    engine: Any = one_rank(random_values(0))
    section = AdapterSection(rank=RANK, interference_budget=0.25, budget_over="total")
    recipe: Any = SimpleNamespace(adapter=section)
    made = Budget.of(engine, recipe, [], device=CPU)
    assert made is not None and (made.limit, made.over) == (0.25, "total")
    nothing: Any = SimpleNamespace(model=None)
    none: Any = SimpleNamespace(adapter=AdapterSection(rank=RANK))
    assert Budget.of(nothing, none, [], device=CPU) is None
    engine.model.b.references[MIXTURE] = 0.0
    with pytest.raises(UserError, match="interference_budget: b puts out nothing but zeros"):
        Budget.of(engine, recipe, [], device=CPU)
