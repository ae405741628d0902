"""Every method but the search for λ: factors of all tasks in, one update a module out (docs/methods.md §4)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nslora_dist import watch
from nslora_dist.errors import UserError
from nslora_dist.export import Factors
from nslora_dist.merge_recipe import SPARSE, MergeRecipe, SparseSection
from nslora_dist.merging.factors import add, compress, concatenate, share_a
from nslora_dist.merging.gram import merge_by_grams
from nslora_dist.merging.tasks import Task
from nslora_dist.merging.updates import LowRankUpdate, SparseUpdate, Update, low_rank

UNIT = 1.0
"""λ where the recipe gives none: the plain sum, for Grams equal weights."""


@dataclass(frozen=True)
class Merged:
    """One module's result.

    Attributes:
        update: low-rank, or a stream of rows where the method has no low rank and none was asked for.
        error: ‖ΔW − ΔW'‖ / ‖ΔW‖ of the compression to ``target_rank``, 0 where nothing was cut.
        shared: whether all tasks had the same A.
    """

    update: Update
    error: float
    shared: bool

    @property
    def factors(self) -> Factors:
        """Of a low-rank result."""
        assert isinstance(self.update, LowRankUpdate)
        return self.update.factors


def module_names(tasks: Sequence[Task]) -> list[str]:
    """Every module that a task adapts, in order of appearance."""
    return list(dict.fromkeys(module for task in tasks for module in task.factors))


def shares_a(tasks: Sequence[Task]) -> bool:
    """Whether all tasks have the same A in every module."""
    return all(
        all(name in task.factors for task in tasks) and share_a([task.factors[name] for task in tasks])
        for name in module_names(tasks)
    )


def merge_modules(
    recipe: MergeRecipe,
    tasks: Sequence[Task],
    *,
    device: torch.device,
    coefficients: Mapping[str, Sequence[float]] | None = None,
) -> Iterator[tuple[str, Merged]]:
    """Merges module by module; factors are on ``device`` while their module's turn lasts.

    Args:
        recipe: method, coefficients, target rank.
        tasks: all adapters.
        device: for the arithmetic; results are on the CPU, except for a stream's.
        coefficients: module → λ of every task, as nsc found them; the recipe's otherwise.

    Raises:
        UserError: method gram and an adapter without Grams, or Grams that do not fit it; too large a coefficient.
    """
    given = recipe.coefficients(UNIT)
    modules = module_names(tasks)
    for number, module in enumerate(modules, start=1):
        watch.progress(f"module {number} of {len(modules)}, {module}")
        mine = [task for task in tasks if module in task.factors]
        pairs = [_on(task.factors[module], device) for task in mine]
        if coefficients is None:
            weights = [given[task.name] for task in mine]
        else:
            by_name = dict(zip([task.name for task in tasks], coefficients[module], strict=True))
            weights = [by_name[task.name] for task in mine]
        yield module, _merge(recipe, module, mine, pairs, weights)


def _merge(
    recipe: MergeRecipe, module: str, tasks: Sequence[Task], pairs: Sequence[Factors], weights: Sequence[float]
) -> Merged:
    shared = len(pairs) > 1 and share_a(pairs)
    if recipe.method in SPARSE:
        section = recipe.sparse or SparseSection()
        names = [task.name for task in tasks]
        by_chance = recipe.method == "dare_ties"
        sparse = SparseUpdate(module, names, pairs, weights, section.density, by_chance, section.seed)
        if recipe.target_rank is None:
            return Merged(sparse, 0.0, shared)
        try:
            factors, error = low_rank(sparse, recipe.target_rank, seed=f"{section.seed}/{module}")
        except UserError as failure:
            raise UserError(f"{module}: {failure}") from failure
        return Merged(LowRankUpdate(_on(factors, torch.device("cpu"))), error, shared)
    if recipe.method == "gram":
        factors = merge_by_grams(pairs, [_gram(task, module, pairs[0].lora_a) for task in tasks], weights)
    elif recipe.method == "cat":
        factors = concatenate(pairs, weights)
    else:
        factors = add(pairs, weights)
    if not all(bool(factor.isfinite().all()) for factor in (factors.lora_a, factors.lora_b)):
        raise UserError(f"{module}: the merged factors are not finite; lower the adapters' coefficients")
    error = 0.0
    if recipe.target_rank is not None and recipe.target_rank < factors.rank:
        factors, error = compress(factors, recipe.target_rank)
    return Merged(LowRankUpdate(_on(factors, torch.device("cpu"))), error, shared)


def _gram(task: Task, module: str, like: Tensor) -> Tensor:
    if task.grams is None or module not in task.grams:
        what = "no update_grams.safetensors" if task.grams is None else f"no Gram of {module}"
        raise UserError(
            f"adapters.{task.name}: method gram needs A G Aᵀ of its training activations, and the adapter has {what}; "
            "train it with train.update_grams, or use method arithmetic or svd"
        )
    gram, rank = task.grams[module], task.factors[module].rank
    if gram.shape != (rank, rank):
        raise UserError(
            f"adapters.{task.name}: its Gram of {module} is {tuple(gram.shape)} and its rank {rank}; collect them again"
        )
    return gram.to(like.device)


def _on(pair: Factors, device: torch.device) -> Factors:
    return Factors(pair.lora_a.to(device), pair.lora_b.to(device))
