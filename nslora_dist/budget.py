"""The interference budget: after every optimizer step B is scaled back to where it disturbs no more than agreed.

    interference = sqrt(tr(B' C B'ᵀ) / tr(W G Wᵀ)),  B' = s · B     (METHODS.md §1c)

is homogeneous in B, so B times min(1, budget / interference) is on the budget, or was within it. B is never gathered:
the trace is a sum over rows, and every rank adds those that it keeps.

What counts is B as the optimizer keeps it, float32, summed in float64. A float32 B times a float32 factor is rounded
once more, by 2⁻²⁴ an element at random: in the tests the sum stays on the budget to 1e-6. In bfloat16 the forward
pass sees B rounded by up to 2⁻⁹ an element, and so does whoever loads the adapter: the interference of that B is a
little more or less than the budget, and is not bound by it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nslora_dist import dist
from nslora_dist.adapter import AdaptedLinear, adapted_linears
from nslora_dist.calibration.store import MIXTURE
from nslora_dist.engines import Engine
from nslora_dist.engines.base import Shard
from nslora_dist.errors import UserError
from nslora_dist.recipe import AdapterSection, BudgetOver

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
            reference = module.references[MIXTURE]
            if not reference > 0:
                raise UserError(
                    f"adapter.interference_budget: {name} puts out nothing but zeros on the calibration texts, so "
                    "there is nothing to measure its update against; leave it out of adapter.target_modules"
                )
            self.modules.append(name)
            forms.append(module.update_grams[MIXTURE].double() * (module.scale**2 / reference))
        self.forms = torch.stack(forms).to(device)
        shards = self._shards()
        ranges = dist.gather([(shard.start, len(shard.values["value"])) for shard in shards])
        self.split = split_rows([shard.shape for shard in shards], ranges)

    @classmethod
    def of(cls, engine: Engine, adapter: AdapterSection, *, device: torch.device) -> "Budget | None":
        """The recipe's budget; None where it sets none."""
        if adapter.interference_budget is None:
            return None
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
        shards = self._shards()
        sums = torch.zeros(len(shards), dtype=torch.float64, device=self.device)
        edges = torch.zeros(len(self.split), self.forms.shape[-1], device=self.device)
        alike: dict[int, dict[int, Tensor]] = {}
        for number, shard in enumerate(shards):
            value = shard.values["value"]
            rows, parts = cut(shard.start, len(value), shard.shape[1])
            alike.setdefault(rows.stop - rows.start, {})[number] = value[rows]
            for row, column, part in parts:
                edges[self.split[number, row], column : column + part.stop - part.start] = value[part]
        for size, whole in alike.items():
            for numbers in batched(whole, max(1, BATCH // max(size, 1))):
                self._add(sums, numbers, torch.stack([whole[number] for number in numbers]))
        if self.split:
            dist.all_reduce(edges)  # one rank gives an element and the others zero: nothing is rounded
            mine = slice(dist.rank(), None, dist.world_size())  # each row on one rank, or it would count twice
            self._add(sums, [number for number, _ in self.split][mine], edges[mine])
        found = dist.all_reduce(sums).clamp_min_(0).sqrt_().tolist()  # C in float32 is definite up to rounding alone
        return dict(zip(self.modules, found, strict=True))

    def _add(self, sums: Tensor, numbers: Sequence[int], rows: Tensor) -> None:
        """Adds Σ b C bᵀ of modules ``numbers`` to ``sums``; ``rows`` (k, n · r) are each one's."""
        if not rows.numel():
            return
        wide = rows.to(self.device, torch.float64).view(len(numbers), -1, self.forms.shape[-1])
        which = torch.tensor(numbers, device=self.device)
        sums.index_add_(0, which, ((wide @ self.forms[which]) * wide).sum((1, 2)))

    def _shards(self) -> list[Shard]:
        """Of every B, in the order of ``modules``."""
        found = {module_of(shard): shard for shard in self.engine.shards(moments=False) if shard.name.endswith(B)}
        return [found[name] for name in self.modules]


def module_of(shard: Shard) -> str:
    """The name of the module that a shard of B belongs to."""
    return shard.name.removesuffix(B)


def batched(numbers: Iterable[int], most: int) -> Iterator[list[int]]:
    """``numbers`` in runs of ``most``."""
    left = list(numbers)
    for start in range(0, len(left), most):
        yield left[start : start + most]


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
    if over == "total":
        whole = spent(interference, over)
        interference = dict.fromkeys(interference, whole)
    return {
        name: rounded_down(limit / value)
        for name, value in interference.items()
        if math.isfinite(value) and value > limit
    }


def rounded_down(value: float) -> float:
    """The largest float32 not above ``value``: B is multiplied in float32, and rounded up it would be above budget."""
    near = torch.tensor(value, dtype=torch.float32)
    if float(near) > value:
        near = torch.nextafter(near, torch.zeros_like(near))
    return float(near)
