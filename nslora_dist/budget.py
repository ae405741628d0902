"""The interference budget: after every optimizer step B is scaled back to where it disturbs no more than agreed.

    interference = sqrt(tr(B' C B'ᵀ) / tr(W G Wᵀ)),  B' = s · B     (docs/methods.md §1c, §1e)

is homogeneous in B, so B times min(1, budget / interference) is on the budget, or was within it. B is never gathered:
the trace is a sum over rows, and every rank adds those that it keeps.

What counts is B as the optimizer keeps it, float32, summed in float64. A float32 B times a float32 factor is rounded
once more, by 2⁻²⁴ an element at random: in the tests the sum stays on the budget to 1e-6. In bfloat16 the forward
pass sees B rounded by up to 2⁻⁸ an element, and so does whoever loads the adapter: the interference of that B is a
little more or less than the budget, and is not bound by it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nslora_dist import dist
from nslora_dist.adapter import AdaptedLinear, adapted_linears
from nslora_dist.calibration.store import MIXTURE, NullSpace
from nslora_dist.calibration_data import CalibrationTexts
from nslora_dist.effects import measure_frozen_a
from nslora_dist.engines import Engine
from nslora_dist.errors import UserError
from nslora_dist.recipe import Recipe
from nslora_dist.recipe_adapter import BudgetOver

B = ".lora_B"
BATCH = 2**23
"""Elements of B that are taken to float64 at a time, 64 MiB: many modules at once, or a GPU would wait for launches."""


@dataclass(frozen=True)
class Kept:
    """What one step came to, the same on every rank.

    Attributes:
        interference: module → what is left after scaling.
        factors: module → what its B was multiplied by, of those that were scaled.
        over: as in the recipe.
    """

    interference: dict[str, float]
    factors: dict[str, float]
    over: BudgetOver

    @property
    def value(self) -> float:
        """The number that the budget is on: the largest module's, or the root mean square."""
        return spent(self.interference, self.over)

    def tags(self) -> dict[str, float]:
        """For the logs."""
        return {
            "interference_budget/spent": self.value,
            "interference_budget/share_of_modules_scaled": len(self.factors) / len(self.interference),
            "interference_budget/smallest_factor": min(self.factors.values(), default=1.0),
        }


class Budget:
    """A limit on the interference with the calibration mixture. Every method is collective, the constructor as well."""

    def __init__(self, engine: Engine, *, limit: float, over: BudgetOver, device: torch.device) -> None:
        """Takes C and tr(W G Wᵀ) of every module.

        Args:
            engine: holds adapters with A frozen and calibrated.
            limit: > 0.
            over: ``module``: every module keeps within it by a factor of its own; ``total``: the root mean square over
                modules does, and all B are multiplied by one factor.
            device: this rank's, where sums are exchanged.

        Raises:
            UserError: a module's outputs are all zero on the calibration texts, so that nothing can be said of it.
        """
        self.engine, self.limit, self.over, self.device = engine, limit, over, device
        self.modules: list[str] = []
        forms = []
        for name, module in adapted_linears(engine.model).items():
            assert isinstance(module, AdaptedLinear) and module.a_is_frozen and not module.residual
            reference = check_reference(name, module.references[MIXTURE])
            self.modules.append(name)
            forms.append(module.update_grams[MIXTURE].double() * (module.scale**2 / reference))
        self.names = [f"{name}{B}" for name in self.modules]
        self._plan(torch.stack(forms).to(device))

    def _plan(self, forms: Tensor) -> None:
        """Lays out what every step does alike: a GPU has done the arithmetic before Python has looked around."""
        by_name = {shard.name: shard for shard in self.engine.shards(moments=False)}
        shards = [by_name[name] for name in self.names]
        ranges = dist.gather([(shard.start, len(shard.values["value"])) for shard in shards])
        split = split_rows([shard.shape for shard in shards], ranges)
        alike: dict[int, list[tuple[int, slice | None]]] = {}
        self.parts = []
        for number, shard in enumerate(shards):
            count, width = len(shard.values["value"]), shard.shape[1]
            rows, parts = cut(shard.start, count, width)
            size = rows.stop - rows.start
            alike.setdefault(size, []).append((number, None if size == count else rows))
            self.parts += [_Part(number, split[number, row], column, part) for row, column, part in parts]
        self.batches = [
            _Batch(chosen, torch.tensor([n for n, _ in chosen], device=self.device), forms[[n for n, _ in chosen]])
            for size, whole in alike.items()
            if size
            for chosen in batched(whole, max(1, BATCH // size))
        ]
        # Each row that is split is counted on one rank, or it would count as often as there are.
        mine = slice(dist.rank(), None, dist.world_size())
        numbers = [number for number, _ in split][mine]
        self.edges = torch.zeros(len(split), forms.shape[-1], device=self.device)
        self.split = _Batch([], torch.tensor(numbers, dtype=torch.long, device=self.device), forms[numbers]), mine

    @classmethod
    def of(
        cls, engine: Engine, recipe: Recipe, texts: Sequence[CalibrationTexts], *, device: torch.device
    ) -> "Budget | None":
        """The recipe's budget; None where it sets none.

        Args:
            engine: before its first step.
            recipe: of the arm.
            texts: the calibration's, for an A that no calibration pass has seen: they are run once.
            device: this rank's.
        """
        adapter = recipe.adapter
        if adapter.interference_budget is None:
            return None
        if adapter.measures_a:
            measure_frozen_a(engine, texts, batch_size=recipe.calibration.batch_size, device=device)
        return cls(engine, limit=adapter.interference_budget, over=adapter.budget_over, device=device)

    def enforce(self) -> Kept:
        """Brings B back within the budget; between a step and whatever reads B next.

        Every rank multiplies by the same bits, for they come from the same sums. AdamW's moments stay as they are: they
        are averages of gradients, and the gradient at the scaled B is not a scaled gradient. So this is projected
        AdamW, and a module on its budget may still turn.
        """
        found = self.measure()
        factors = scale_factors(found, limit=self.limit, over=self.over)
        if factors:
            self.engine.scale({f"{name}{B}": factor for name, factor in factors.items()})
        return Kept({name: value * factors.get(name, 1.0) for name, value in found.items()}, factors, self.over)

    def facts(self) -> dict[str, Any]:
        """For the report and the card: ``limit``, ``over``, and ``final``, what is spent of it now."""
        return {"limit": self.limit, "over": self.over, "final": spent(self.measure(), self.over)}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Module → interference of B as it is, exactly the same numbers on every rank."""
        values = self.engine.masters(self.names)
        sums = torch.zeros(len(values), dtype=torch.float64, device=self.device)
        for batch in self.batches:
            rows = [values[n] if own is None else values[n].view(-1)[own] for n, own in batch.chosen]
            batch.add(sums, torch.stack(rows))
        if len(self.edges):
            self.edges.zero_()
            for part in self.parts:
                row, width = values[part.number].view(-1)[part.own], part.own.stop - part.own.start
                self.edges[part.place, part.column : part.column + width] = row
            dist.all_reduce(self.edges)  # one rank gives an element and the others zero: nothing is rounded
            batch, mine = self.split
            batch.add(sums, self.edges[mine])
        # C in float32 is definite up to rounding alone.
        found = dist.numbers(dist.all_reduce(sums).clamp_min_(0).sqrt_())
        return dict(zip(self.modules, found, strict=True))


@dataclass(frozen=True)
class _Part:
    """A part of a row of which this rank has not all: of which module, to which place and column of the exchange."""

    number: int
    place: int
    column: int
    own: slice


@dataclass(frozen=True)
class _Batch:
    """Modules of which this rank has equally many whole rows: which, and which elements of its run (None: all)."""

    chosen: list[tuple[int, slice | None]]
    numbers: Tensor
    forms: Tensor

    def add(self, sums: Tensor, rows: Tensor) -> None:
        """Adds each one's Σ b C bᵀ to ``sums``; ``rows`` are (k, n · r), or (k, n, r)."""
        if rows.numel():
            wide = rows.to(sums.device, torch.float64).view(len(rows), -1, self.forms.shape[-1])
            sums.index_add_(0, self.numbers, ((wide @ self.forms) * wide).sum((1, 2)))


def batched(whole: list[Any], most: int) -> Iterator[list[Any]]:
    """``whole`` in runs of ``most``."""
    for start in range(0, len(whole), most):
        yield whole[start : start + most]


def check_references(null_space: NullSpace) -> None:
    """Whether a budget can be kept with these calibration texts, before anything is loaded or trained.

    Raises:
        UserError: as ``Budget``.
    """
    for name, module in null_space.manifest["modules"].items():
        check_reference(name, module["references"][MIXTURE])


def check_reference(name: str, reference: float) -> float:
    """A module's tr(W G Wᵀ), where an update can be measured against it."""
    if not reference > 0:
        kind = name.rsplit(".", 1)[-1]
        raise UserError(
            f"adapter.interference_budget: {name} puts out nothing but zeros on the calibration texts, so there is "
            f"nothing to measure its update against; leave {kind} out of adapter.target_modules, in every block, or "
            "go without a budget"
        )
    return reference


def cut(start: int, count: int, width: int) -> tuple[slice, list[tuple[int, int, slice]]]:
    """A run of ``count`` elements from ``start`` on of a row-major matrix, cut at the ends of its rows.

    Returns:
        Which of the run's elements make whole rows, and of the one or two parts of rows besides: row, first column,
        and which of the run's elements.
    """
    if not count:
        return slice(0, 0), []
    stop = start + count
    first, last = -(-start // width), stop // width
    if first > last:  # within one row
        return slice(0, 0), [(last, start - last * width, slice(0, count))]
    parts = []
    if first * width > start:
        parts.append((first - 1, start - (first - 1) * width, slice(0, first * width - start)))
    if last * width < stop:
        parts.append((last, 0, slice(last * width - start, count)))
    return slice(first * width - start, last * width - start), parts


def split_rows(
    shapes: Sequence[tuple[int, ...]], ranges: Sequence[Sequence[tuple[int, int]]]
) -> dict[tuple[int, int], int]:
    """(number of the matrix, row) → its place in the exchange, of the rows of which no rank has all.

    Where the ranks divide the rows there are none, as under FSDP2 ever; else one a boundary between two ranks.

    Args:
        shapes: of the matrices.
        ranges: by rank and matrix, the start and length of its run.
    """

    def all_of_them() -> Iterator[tuple[int, int]]:
        for kept in ranges:
            for number, ((start, count), shape) in enumerate(zip(kept, shapes, strict=True)):
                for row, _, _ in cut(start, count, shape[1])[1]:
                    yield number, row

    return {place: index for index, place in enumerate(sorted(set(all_of_them())))}


def spent(interference: dict[str, float], over: BudgetOver) -> float:
    """What is compared with the budget: the largest module's interference, or the root mean square over modules."""
    values = interference.values()
    return max(values) if over == "module" else math.sqrt(sum(value * value for value in values) / len(values))


def scale_factors(interference: dict[str, float], *, limit: float, over: BudgetOver) -> dict[str, float]:
    """Module → the factor below 1 that brings it within the budget; those that are within are left out.

    A value that is not finite is left alone: scaling would not mend it, and the next step's loss, which is not finite
    either, tells of it.
    """
    values = np.array(list(interference.values()))
    if over == "total":
        values[:] = spent(interference, over)
    above = np.isfinite(values) & (values > limit)
    factors = rounded_down(limit / values[above]).tolist()
    return dict(zip(np.array(list(interference))[above].tolist(), factors, strict=True))


def rounded_down(values: np.ndarray) -> np.ndarray:
    """The largest float32 not above each float64: rounded up, B would be above its budget."""
    near = values.astype(np.float32)
    return np.where(near > values, np.nextafter(near, np.float32(0)), near)
