"""The recipe: one fine-tuning job as typed, frozen values.

Every check that needs no weights lives here, so that a wrong recipe ends before anything is loaded.
``recipe_file.py`` reads it from YAML.
"""

from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from nslora_dist.explain import explain
from nslora_dist.recipe_adapter import METHODS_OWN, AdapterSection
from nslora_dist.recipe_lm_eval import LmEvalSection
from nslora_dist.recipe_train import CheckpointSection, EngineSection, TrainSection
from nslora_dist.recipe_types import MIXTURE, Count, Fraction, Name, Positive, Section, Seed, Where
from nslora_dist.redact import redact_all
from nslora_dist.zero_file import read_zero_config
from nslora_dist.zero_knobs import check_knobs

ARM_NAMES = {"lora_null": "null_space", "lora": "lora", "null_lora": "null_lora"}

VOLATILE = (
    *("engine", "checkpoint", "resume", "output_dir", "base_model.config"),
    *("calibration.batch_size", "calibration.hidden_states", "evaluation.batch_size"),
    "evaluation.lm_eval",  # what is asked of a trained arm changes nothing in it, and a task that fails can be left out
    *("train.micro_batch_size", "train.activation_checkpointing", "train.compile", "train.log_every"),
)
"""What may change while a run goes on: how it is computed and where, not what; results differ by rounding at most."""


class BaseModelSection(Section):
    """Which pre-trained model is adapted, and how its frozen weights are held.

    ``config`` is a folder with the model's ``config.json``, for dry runs and planning without its checkpoint at hand.
    """

    path: Where
    revision: str | None = None
    config: Where | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantization: Literal["none", "nf4"] = "none"
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"


class Texts(Section):
    """A named set of plain texts: a hub dataset, or a local JSON, JSONL or Parquet file."""

    path: Where
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    on_bad_row: Literal["error", "skip"] = "error"  # not UTF-8, broken JSON, a field that is missing or not text


class Source(Texts):
    """Texts whose activations shape the null space (docs/methods.md §1d)."""

    weight: Positive = 1.0


class SolverSection(Section):
    """How the r smallest eigenpairs of each Gram matrix are found, and on which ranks."""

    method: Literal["eigh", "fast"] = "fast"
    placement: Literal["rank0", "spread"] = "rank0"


class CalibrationSection(Section):
    """The streamed Gram pass over named sources, and probes that only measure."""

    sources: Annotated[dict[Name, Source], Field(min_length=1)]
    probes: dict[Name, Texts] = {}
    samples: Annotated[Count, Field(ge=2)] = 256
    sequence_length: Count = 2048
    batch_size: Count = 1
    concatenate: bool = False  # join short rows, an end-of-sequence token after each, into sequences of full length
    heldout_fraction: Fraction = 0.125
    hidden_states: Literal["device", "host"] = "device"
    seed: Seed = 0
    solver: SolverSection = SolverSection()

    @model_validator(mode="after")
    def _names(self) -> "CalibrationSection":
        both = sorted(set(self.sources) & set(self.probes))
        if both:
            raise ValueError(f"'{both[0]}' names a source and a probe; give the probe another name")
        for kind, named in (("source", self.sources), ("probe", self.probes)):
            if MIXTURE in named:
                raise ValueError(f"'{MIXTURE}' names the mixture of all sources; give the {kind} another name")
        return self


class PromptSet(Section):
    """Rows of a prompt and its response: a hub dataset, or a local JSON, JSONL or Parquet file."""

    path: Where
    subset: str | None = None
    split: str = "train"
    prompt_field: str = "prompt"
    response_field: str = "response"
    samples: Count | None = None
    template: str = "{prompt}"
    on_bad_row: Literal["error", "skip"] = "error"  # as for texts; an empty response as well

    @model_validator(mode="after")
    def _template(self) -> "PromptSet":
        if self.template.count("{prompt}") != 1:
            raise ValueError("template must hold {prompt} exactly once; the response follows it directly")
        return self


class DataSection(PromptSet):
    """What the adapter is trained on; the loss covers the response and the end-of-sequence token."""

    max_length: Count = 512
    packing: bool = False


class Baseline(Section):
    """Another arm trained on the same data for comparison: overrides of ``adapter`` and ``train``."""

    adapter: dict[str, Any] = {}
    train: dict[str, Any] = {}


class EvaluationSection(Section):
    """What is measured on the base and on every arm: greedy exact match on prompts with known responses; lm-eval."""

    adaptation: PromptSet | None = None
    retention: dict[str, PromptSet] = {}
    batch_size: Count = 8
    max_length: Count = 8192  # longer questions, answer included, are left out; of a base with less context, than that
    lm_eval: LmEvalSection | None = None
    baselines: dict[Name, Baseline] = {}


class Recipe(Section):
    """One job, whole: ``recipe → base model → Grams → null space → adapter → engine → trainer → evaluation``."""

    name: Name
    base_model: BaseModelSection
    calibration: CalibrationSection
    adapter: AdapterSection
    data: DataSection
    train: TrainSection
    engine: EngineSection = EngineSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    resume: Literal["auto", "never"] = "auto"  # the same command again continues what the run folder holds
    output_dir: Where

    @model_validator(mode="after")
    def _combinations(self) -> "Recipe":
        base = self.base_model
        if base.attention == "flash_attention_2" and base.dtype != "bfloat16":
            raise ValueError("base_model.attention 'flash_attention_2' is for 16 bits: set base_model.dtype: bfloat16")
        if self.data.packing and base.attention == "eager":
            raise ValueError(
                "data.packing needs an attention that keeps packed samples apart without a dense mask: "
                "set base_model.attention to sdpa or flash_attention_2"
            )
        if self.data.packing and base.attention == "flash_attention_2" and self.train.micro_batch_size > 1:
            # transformers looks for packed samples in batches of one row alone; in larger ones they see each other.
            raise ValueError(
                "data.packing with flash_attention_2 keeps samples apart only in batches of one row: "
                "set train.micro_batch_size: 1 and a longer data.max_length"
            )
        if self.engine.name == "zero3" and self.engine.config is not None:
            check_knobs(self.engine.config, check_zero_config(self))
        if self.engine.name != "zero3" and self.engine.config is not None:
            raise ValueError(f"engine.config is a DeepSpeed file, engine.name is '{self.engine.name}': leave it out")
        if self.train.compile and self.engine.name == "zero3":
            raise ValueError(
                "train.compile: DeepSpeed's hooks on every module would cut the compiled blocks to pieces: "
                "set engine.name to fsdp2 or single, or train.compile: false"
            )
        for name in self.evaluation.baselines:
            if name in ("base", self.arm_name):
                raise ValueError(f"evaluation.baselines.{name}: that name is taken in the report; choose another")
            self.arm(name)
        return self

    @property
    def writes_update_grams(self) -> bool:
        """Whether the exported adapter is to carry the r × r Grams for Gram-weighted merging (docs/methods.md §4)."""
        chosen = self.train.update_grams
        return self.adapter.method == "lora_null" if chosen is None else chosen

    @property
    def arm_name(self) -> str:
        """The key of this recipe's own adapter in ``report.json``'s ``evaluation``."""
        return ARM_NAMES[self.adapter.method]

    def arm(self, baseline: str) -> "Recipe":
        """This recipe with a baseline's overrides in place, and no further baselines."""
        changes = self.evaluation.baselines[baseline]
        tree = self.model_dump(exclude={"evaluation": {"baselines"}})
        if changes.adapter.get("method", self.adapter.method) != self.adapter.method:
            for key in METHODS_OWN:  # the *other* method's
                del tree["adapter"][key]
        if changes.adapter.get("interference_budget", 0.0) is None:  # nor does one without a budget take its rule over
            tree["adapter"].pop("budget_over", None)
        tree["adapter"] |= changes.adapter
        tree["train"] |= changes.train
        try:
            return Recipe.model_validate(tree)
        except ValidationError as error:
            raise ValueError(f"evaluation.baselines.{baseline}: {explain(error, Recipe)}") from error

    def lasting(self) -> dict[str, Any]:
        """The recipe as JSON without ``VOLATILE``: what two starts of one run have in common."""
        return without_volatile(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """The resolved recipe, every default filled in and every secret masked."""
        return yaml.safe_dump(redact_all(self.model_dump(mode="json")), sort_keys=False, allow_unicode=True, width=120)


def without_volatile(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe's tree without ``VOLATILE``; the tree itself stays as it is."""
    return _without(tree, [tuple(name.split(".")) for name in VOLATILE])


def _without(tree: dict[str, Any], paths: list[tuple[str, ...]]) -> dict[str, Any]:
    gone = {path[0] for path in paths if len(path) == 1}
    return {
        key: _without(value, [path[1:] for path in paths if path[0] == key and len(path) > 1])
        if isinstance(value, dict)
        else value
        for key, value in tree.items()
        if key not in gone
    }


def zero_settings(recipe: Recipe) -> dict[str, Any]:
    """What DeepSpeed's config is on any number of ranks, whatever ``engine.config`` says."""
    return {
        "train_batch_size": recipe.train.global_batch_size,
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
        "gradient_clipping": recipe.train.max_grad_norm,
        "bf16": {"enabled": recipe.base_model.dtype == "bfloat16"},
        # Gradients are summed over micro-batches and ranks in float32, as FSDP2's are.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
    }


def check_zero_config(recipe: Recipe) -> dict[str, Any]:
    """The ZeRO knobs of ``engine.config``.

    Raises:
        ValueError: it cannot be read, or contradicts the recipe.
    """
    assert recipe.engine.config is not None
    whole = zero_settings(recipe) | {"fp16.enabled": False, "zero_optimization.stage": 3}
    return read_zero_config(recipe.engine.config, whole)
