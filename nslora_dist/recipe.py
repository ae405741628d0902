"""The recipe: one fine-tuning job as typed, frozen values.

Every check that needs no weights lives here, so that a wrong recipe ends before anything is loaded.
``recipe_file.py`` reads it from YAML.
"""

from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from nslora_dist.explain import explain
from nslora_dist.recipe_lm_eval import LmEvalSection
from nslora_dist.recipe_train import CheckpointSection, EngineSection, TrainSection
from nslora_dist.recipe_types import MIXTURE, Count, Fraction, Name, Names, Positive, Section, Seed, Where
from nslora_dist.redact import redact_all
from nslora_dist.zero_file import read_zero_config
from nslora_dist.zero_knobs import check_knobs

LINEAR_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARM_NAMES = {"lora_null": "null_space", "lora": "lora", "null_lora": "null_lora"}
METHODS_OWN = ("form", "freeze_a", "a_init", "null_dim", "null_threshold", "interference_budget", "budget_over")
"""Of ``adapter``, what is one method's own: a baseline of another method does not take it over."""
NULL_DIM = 256
"""Most null directions of a weight kept a side: four times a rank of 64, of the 20,480 that a 70B down_proj has."""
NULL_THRESHOLD = 0.1
"""σ / σ_max up to which a direction of a weight counts as null: it passes 1% of the energy that the strongest does.

The short side of a trained rectangular matrix is well-conditioned: in ``recipes/tiny/base`` no more than 0 to 5
directions of gate, up, down, k and v have σ ≤ 0.05 σ_max, and 8 to 80 have σ ≤ 0.1 σ_max.
"""

BudgetOver = Literal["module", "total"]

VOLATILE = (
    *("engine", "checkpoint", "resume", "output_dir", "base_model.config"),
    *("calibration.batch_size", "calibration.hidden_states", "evaluation.batch_size"),
    "evaluation.lm_eval.batch_size",
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
    """Texts whose activations shape the null space (METHODS.md §1d)."""

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


class AdapterSection(Section):
    """The low-rank update ΔW = alpha/rank · B A of every target module.

    ``lora_null`` in ``delta`` form trains B from zero on the untouched base with A frozen (METHODS.md §1a);
    in ``residual`` form it is LoRA-Null v1 (``freeze_a: false``) or v2 (``freeze_a: true``) of the paper;
    ``lora`` is plain LoRA, with ``freeze_a: true`` the frozen-random-A baseline;
    ``null_lora`` freezes one half of A and of B and keeps ΔW in the null space of the weights (METHODS.md §2).

    ``interference_budget`` is the most that ‖ΔW X‖ / ‖W X‖ (METHODS.md §1c) may come to on the mixture of all
    calibration sources, after every optimizer step: B is scaled back to it. With ``budget_over: module`` every module
    keeps within it; with ``total`` the root mean square over modules does, and all B are scaled by one factor. For a
    frozen A and a B from zero: ``lora_null`` in delta form, and ``lora`` with ``freeze_a: true``.
    """

    method: Literal["lora_null", "lora", "null_lora"] = "lora_null"
    form: Literal["delta", "residual"] = "delta"
    rank: Count
    alpha: Positive | None = None
    target_modules: Names = LINEAR_TARGETS
    freeze_a: bool | None = None
    a_init: Literal["projected", "orthonormal"] = "projected"
    null_dim: Count = NULL_DIM
    null_threshold: Annotated[float, Field(ge=1e-6, lt=1.0)] = NULL_THRESHOLD
    interference_budget: Annotated[float, Field(ge=1e-6)] | None = None
    budget_over: BudgetOver = "module"

    @property
    def scale(self) -> float:
        """alpha / rank; alpha defaults to the rank, which makes it 1."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def a_is_frozen(self) -> bool:
        """Whether A stays as initialised: by default for lora_null, not for lora."""
        return self.method == "lora_null" if self.freeze_a is None else self.freeze_a

    @property
    def measures_a(self) -> bool:
        """Whether training starts with a pass over the calibration texts, to know a random A's A G Aᵀ."""
        return self.method == "lora" and self.interference_budget is not None

    @model_validator(mode="after")
    def _form(self) -> "AdapterSection":
        if self.method == "lora" and self.form == "residual":
            raise ValueError("form 'residual' needs method 'lora_null'; plain LoRA starts at zero: use form: delta")
        if self.method == "lora_null" and self.form == "delta" and self.freeze_a is False:
            raise ValueError(
                "the delta form equals LoRA-Null only while A is frozen: set freeze_a: true, or form: residual for v1"
            )
        if self.form == "residual" and self.a_init == "orthonormal":
            raise ValueError("form 'residual' starts from B0 A0 = W U Uᵀ and needs a_init: projected")
        return self

    @model_validator(mode="after")
    def _budget(self) -> "AdapterSection":
        if self.interference_budget is None:
            if self.budget_over != "module":
                raise ValueError("budget_over says what interference_budget is over: set that too, or leave both out")
        elif self.method == "null_lora" or self.form != "delta" or not self.a_is_frozen:
            here = f"form '{self.form}'" if self.method == "lora_null" else f"method '{self.method}'"
            here += " with A trained" if self.method == "lora" else ""
            raise ValueError(
                f"interference_budget needs an A that stays as it was and a B that starts from zero, and {here} has "
                "not: set method: lora_null and form: delta, or method: lora and freeze_a: true, or "
                "interference_budget: null"
            )
        return self

    @model_validator(mode="after")
    def _null_lora(self) -> "AdapterSection":
        if self.method != "null_lora":
            for key, default in (("null_dim", NULL_DIM), ("null_threshold", NULL_THRESHOLD)):
                if getattr(self, key) != default:
                    raise ValueError(f"{key} is for method 'null_lora': leave it out, or set method: null_lora")
            return self
        if self.form == "residual" or self.a_init == "orthonormal" or self.freeze_a is not None:
            raise ValueError(
                "method 'null_lora' freezes one half of A and of B and trains the other from zero: "
                "leave form, a_init and freeze_a out"
            )
        if self.rank % 2:
            raise ValueError(
                f"method 'null_lora' halves the rank, and {self.rank} is odd: use rank: {self.rank + 1} "
                f"for the parameters of a LoRA of rank {(self.rank + 1) // 2}"
            )
        if self.null_dim < self.rank:
            raise ValueError(f"null_dim {self.null_dim} leaves no room for rank {self.rank}: set null_dim: {self.rank}")
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
        """Whether the exported adapter is to carry the r × r Grams that Gram-weighted merging reads (METHODS.md §4)."""
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
