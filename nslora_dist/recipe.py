"""The recipe: one fine-tuning job as typed, frozen values.

Every check that needs no weights lives here, so that a wrong recipe ends before anything is loaded.
``recipe_file.py`` reads it from YAML.
"""

from typing import Any, Literal

import yaml
from pydantic import ValidationError, model_validator

from nslora_dist.explain import explain
from nslora_dist.recipe_adapter import METHODS_OWN, AdapterSection
from nslora_dist.recipe_data import CalibrationSection, DataSection, PromptSet
from nslora_dist.recipe_lm_eval import LmEvalSection
from nslora_dist.recipe_train import CheckpointSection, EngineSection, TrainSection
from nslora_dist.recipe_types import Count, LocalPath, Name, Section, Where
from nslora_dist.redact import redact_all
from nslora_dist.zero_file import read_zero_config
from nslora_dist.zero_knobs import check_knobs

ARM_NAMES = {"lora_null": "null_space", "lora": "lora", "null_lora": "null_lora"}
FROZEN_A = "lora_frozen_a"
"""Of plain LoRA whose random A stays as it is: another method, by another name."""

VOLATILE = (
    *("engine", "checkpoint", "resume", "output_dir", "base_model.config"),
    *("calibration.batch_size", "calibration.hidden_states", "evaluation.batch_size"),
    "evaluation.lm_eval",  # what is asked of a trained arm changes nothing in it, and a task that fails can be left out
    *("train.micro_batch_size", "train.activation_checkpointing", "train.compile", "train.log_every"),
)
"""What may change while a run goes on: how it is computed and where, not what; results differ by rounding at most."""


class BaseModelSection(Section):
    """Which pre-trained model is adapted (of the layout of LLaMA, Mistral, Qwen 2 or 3), and how it is held."""

    path: Where
    """The model in safetensors, with its tokenizer: a local folder, or from the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub; a local folder has none."""
    config: Where | None = None
    """Another place of the model's ``config.json``, for dry runs and planning without its checkpoint at hand; a run
    refuses one of other sizes than the checkpoint's."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the base is held and computed in; the optimizer keeps float32 of what trains in any case."""
    quantization: Literal["none", "nf4"] = "none"
    """``nf4`` packs the blocks' linears to 4 bits as they are loaded; their input widths must be multiples of 64."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """The kernel; flash_attention_2 needs its package, a GPU and bfloat16, and ``eager`` cannot pack rows."""


class Baseline(Section):
    """Another arm trained on the same data for comparison: overrides of ``adapter`` and ``train``."""

    adapter: dict[str, Any] = {}
    """Keys of ``adapter`` with other values; with another method, those that are one method's own (form, freeze_a, the
    budget and the like) are back at their defaults. A ``lora_null`` shares the recipe's null space, and with it rank,
    form, a_init and target_modules."""
    train: dict[str, Any] = {}
    """Keys of ``train`` with other values, such as a learning rate of its own."""


class EvaluationSection(Section):
    """What is measured on the base and on every arm: greedy exact match on prompts with known responses; lm-eval."""

    adaptation: PromptSet | None = None
    """Questions on what is learned; null asks none."""
    retention: dict[str, PromptSet] = {}
    """Named sets of questions on what is to be kept; the report has each one's share and their mean."""
    batch_size: Count = 8
    """Questions of a rank in one forward pass."""
    max_length: Count = 8192
    """Tokens; longer questions, answer included, are left out; of a base with less context, than that."""
    lm_eval: LmEvalSection | None = None
    """EleutherAI's harness, which has to be installed (``.[lm-eval]``); null leaves it out."""
    baselines: dict[Name, Baseline] = {}
    """Arms that are trained and measured as well, one after the other, by the names they get in the report."""


class Recipe(Section):
    """One job, whole: ``recipe → base model → Grams → null space → adapter → engine → trainer → evaluation``."""

    name: Name
    """Of the run, for the adapter's card and ``output_dir``."""
    base_model: BaseModelSection
    calibration: CalibrationSection
    adapter: AdapterSection
    data: DataSection
    train: TrainSection
    engine: EngineSection = EngineSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    resume: Literal["auto", "never"] = "auto"
    """``auto``: the same command again goes on with what ``output_dir`` holds; ``never``: a run begun there is an
    error."""
    output_dir: LocalPath
    """The run's folder, never another run's; with several machines on a file system that all of them share."""

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
        return arm_name(self.adapter.method, freeze_a=self.adapter.freeze_a)

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


def arm_name(method: str, *, freeze_a: bool | None) -> str:
    """What an arm of this ``adapter`` section is called, where its recipe gives it no name."""
    return FROZEN_A if method == "lora" and freeze_a else ARM_NAMES.get(method, "null_space")


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
