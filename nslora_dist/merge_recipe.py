"""The merge recipe: several adapters of one base into one, as typed, frozen values; read from YAML like any recipe."""

from collections.abc import Sequence
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from nslora_dist.recipe import BaseModelSection
from nslora_dist.recipe_data import Texts
from nslora_dist.recipe_file import load_recipe_as
from nslora_dist.recipe_types import Count, LocalPath, Name, Positive, Section, Seed, Where
from nslora_dist.redact import redact_all

Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Task = Literal[
    "causal_lm",
    "sequence_classification",
    "image_classification",
    "token_classification",
    "question_answering",
    "feature_extraction",
]
Method = Literal["nsc", "gram", "arithmetic", "svd", "cat", "ties", "dare_ties"]
SPARSE = ("ties", "dare_ties")
"""Methods whose result has no low rank of its own."""


class MergeBase(BaseModelSection):
    """The base that all adapters belong to: any model whose adapted layers are ``nn.Linear``.

    ``dtype``, ``quantization`` and, where it has the LLaMA layout, ``attention`` are for method nsc, which runs it.
    """

    shard: bool = False
    """For nsc on a base of the LLaMA layout: spreads it over the ranks (FSDP2), where it fits no single one."""
    task: Task | None = None
    """Which head the model is loaded with; null takes the one that the adapters, or the base's config, name."""


class MergedAdapter(Section):
    """A PEFT LoRA folder and its coefficient λ."""

    path: LocalPath
    """The adapter's folder, ours or anybody's."""
    coefficient: Finite | None = None
    """λ: of its ΔW, in ``gram`` of its Grams and above 0, in ``nsc`` where λ starts. All adapters have one, or none:
    null is 1, in nsc ``nsc.initial``."""


class Inputs(Texts):
    """A few unlabelled inputs of one adapter's task: texts, or a safetensors file of ready model inputs.

    Of the latter, such as pixel values, ``path`` and ``samples`` alone are read.
    """

    path: Where
    """Texts as a local .json, .jsonl, .ndjson or .parquet file, a local folder or a hub dataset; or a .safetensors
    file."""
    samples: Count = 32
    """Inputs of the task at most."""
    max_length: Count = 512
    """Tokens of a text, to which longer ones are cut."""


class NscSection(Section):
    """Null-space compression (docs/methods.md §3); for method nsc alone, with all defaults where it is left out."""

    granularity: Literal["block", "module"] = "block"
    """Whether all modules of a block share an adapter's λ, or each has its own."""
    target_fraction: Share = 0.25
    """Share of the blocks, counted from the last, whose null-space ratio is lowered."""
    initial: Finite = 0.4
    """Where λ starts, if the adapters have no coefficients."""
    learning_rate: Positive | None = None
    """AdamW's rate for λ; null: 3e-4, for images 1e-3."""
    steps: Count | None = None
    """Optimizer steps; null: 500, for images 100."""
    batch_size: Count = 4
    """Inputs of each task in a step, over all ranks."""
    activation_checkpointing: bool = False
    """Computes activations again in the backward pass: less memory, more time."""
    seed: Seed = 0
    """Decides which texts are drawn, and the order of inputs."""


class SparseSection(Section):
    """TIES and DARE; for methods ties and dare_ties alone, with all defaults where it is left out."""

    density: Share = 0.2
    """Share of each ΔW's entries that stay, by magnitude (ties) or by chance (dare_ties)."""
    seed: Seed = 0
    """Decides what dare_ties drops, and where the search for the factors of ``target_rank`` starts."""


class MergeRecipe(Section):
    """One merge, whole."""

    name: Name
    """Of the merge, for the adapter's card and ``output_dir``."""
    base_model: MergeBase | None = None
    """Needed by method nsc and for ``output: model``; else the base that the adapters name goes into the result."""
    adapters: dict[Name, MergedAdapter]
    """At least two, of one base."""
    method: Method
    """``arithmetic`` and ``cat``: the exact sum; ``svd``: that at ``target_rank``; ``ties``, ``dare_ties``: trimmed,
    signs elected; ``gram``: weighted by the Grams that adapters carry; ``nsc``: λ found on a few inputs."""
    nsc: NscSection | None = None
    """For method nsc alone."""
    sparse: SparseSection | None = None
    """For methods ties and dare_ties alone."""
    inputs: dict[str, Inputs] = Field(default_factory=dict)
    """Inputs of every adapter, by its name; for method nsc, which needs them, alone."""
    target_rank: Count | None = None
    """The rank that the result is compressed to, if it has more; needed by svd, and by ties and dare_ties for an
    adapter; not for cat."""
    output: Literal["adapter", "model"] = "adapter"
    """One PEFT adapter, or a full model: the base's files with the update added."""
    output_dir: LocalPath
    """A folder that does not exist yet."""
    allow_mismatch: tuple[Literal["base", "calibration", "target_modules"], ...] = ()
    """In what the adapters may differ from each other (with ``base`` from ``base_model`` too) without an error."""
    timeout_seconds: Annotated[float, Field(ge=1.0)] = 1800.0
    """Seconds without any progress, after which a rank counts as missing and all of them end."""

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, tree: object) -> object:
        if isinstance(tree, dict) and isinstance(tree.get("allow_mismatch"), list):
            return {**tree, "allow_mismatch": tuple(tree["allow_mismatch"])}
        return tree

    @model_validator(mode="after")
    def _combinations(self) -> "MergeRecipe":
        if len(self.adapters) < 2:
            raise ValueError(f"adapters: a merge needs at least two, this recipe names {len(self.adapters)}")
        given = [name for name, adapter in self.adapters.items() if adapter.coefficient is not None]
        if 0 < len(given) < len(self.adapters):
            missing = next(name for name in self.adapters if name not in given)
            raise ValueError(
                f"adapters.{missing}.coefficient: missing, while {len(given)} of {len(self.adapters)} adapters have "
                "one; give all of them one, or none"
            )
        for section, methods in (("nsc", ("nsc",)), ("sparse", SPARSE)):
            if getattr(self, section) is not None and self.method not in methods:
                raise ValueError(
                    f"{section}: belongs to method {' or '.join(methods)}, this is method {self.method}; leave it out"
                )
        if self.base_model is None and (self.method == "nsc" or self.output == "model"):
            why = "method nsc runs it" if self.method == "nsc" else "output model is written from it"
            raise ValueError(f"base_model: missing, and {why}; give base_model.path")
        for name, adapter in self.adapters.items():
            if self.method == "gram" and adapter.coefficient is not None and adapter.coefficient <= 0:
                raise ValueError(
                    f"adapters.{name}.coefficient: is {adapter.coefficient:g}, and method gram weighs a Gram by it: "
                    "give a positive number, leave the adapter out, or use method arithmetic"
                )
        self._check_inputs()
        self._check_rank()
        return self

    def _check_inputs(self) -> None:
        if self.method != "nsc":
            if self.inputs:
                raise ValueError(f"inputs: only method nsc reads them, this is method {self.method}; leave them out")
            return
        for name in self.adapters:
            if name not in self.inputs:
                raise ValueError(f"inputs.{name}: missing; method nsc needs a few unlabelled inputs of every adapter")
        for name in self.inputs:
            if name not in self.adapters:
                raise ValueError(f"inputs.{name}: no adapter has this name; adapters has {', '.join(self.adapters)}")

    def _check_rank(self) -> None:
        if self.method == "cat" and self.target_rank is not None:
            raise ValueError("target_rank: cat is exact and has the sum of the ranks; use method svd to compress")
        if self.method == "svd" and self.target_rank is None:
            raise ValueError("target_rank: missing, and method svd compresses to it")
        if self.method in SPARSE and self.output == "adapter" and self.target_rank is None:
            raise ValueError(
                f"target_rank: missing; the result of {self.method} has no low rank: give one, or output: model"
            )

    def coefficients(self, default: float) -> dict[str, float]:
        """Every adapter's λ."""
        return {n: default if a.coefficient is None else a.coefficient for n, a in self.adapters.items()}

    def to_yaml(self) -> str:
        """The resolved recipe, every default filled in and every secret masked."""
        return yaml.safe_dump(redact_all(self.model_dump(mode="json")), sort_keys=False, allow_unicode=True, width=120)


def load_merge_recipe(name: str, overrides: Sequence[str] = ()) -> MergeRecipe:
    """Reads a merge recipe by its name in ``recipes/`` or by its path, and applies ``key=value`` overrides.

    Raises:
        UserError: as ``load_recipe``.
    """
    return load_recipe_as(MergeRecipe, name, overrides)
