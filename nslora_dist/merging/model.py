"""The base with all tasks' updates on it, for null-space compression: sharded unit by unit, or whole on every rank."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedConfig

from nslora_dist import dist, watch
from nslora_dist.base_config import load_config
from nslora_dist.base_files import BaseFiles, locate
from nslora_dist.base_model import build_empty, torch_dtype, units
from nslora_dist.base_weights import fill_unit, finish
from nslora_dist.errors import UserError
from nslora_dist.explain import nearest
from nslora_dist.export import Factors
from nslora_dist.frozen import FrozenLinear, keep_bytes
from nslora_dist.merge_recipe import MergeBase
from nslora_dist.merging.blocks import block_of, is_in_block
from nslora_dist.merging.merged_linear import Coefficients, MergedLinear
from nslora_dist.merging.tasks import Task
from nslora_dist.nf4 import BLOCK as NF4_BLOCK
from nslora_dist.rows import one_line

log = logging.getLogger("nslora_dist")

AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "feature_extraction": "AutoModel",
}
PEFT_TASKS = {
    "CAUSAL_LM": "causal_lm",
    "SEQ_CLS": "sequence_classification",
    "TOKEN_CLS": "token_classification",
    "QUESTION_ANS": "question_answering",
    "FEATURE_EXTRACTION": "feature_extraction",
}
ARCHITECTURES = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForImageClassification": "image_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
}


@dataclass(frozen=True)
class MergedModel:
    """A model ready to run.

    Attributes:
        root: what is called with a batch's arguments; its output is of no interest.
        linears: module name → merged linear, in the model's order.
        coefficients: all λ.
    """

    root: nn.Module
    linears: dict[str, MergedLinear]
    coefficients: Coefficients


def model_task(base: MergeBase | None, tasks: Sequence[Task], config: PreTrainedConfig | None = None) -> str:
    """The kind of model: as the recipe or the adapters say, else by the class that the checkpoint was saved from."""
    if base is not None and base.task is not None:
        return base.task
    for task in tasks:
        kind = PEFT_TASKS.get(str(task.config.get("task_type")))
        if kind is not None:
            return kind
    saved = [str((task.config.get("auto_mapping") or {}).get("base_model_class")) for task in tasks]
    for name in [*saved, *(getattr(config, "architectures", None) or [])]:
        for ending, kind in ARCHITECTURES.items():
            if name.endswith(ending):
                return kind
    return "feature_extraction"


def load_merged(
    base: MergeBase, tasks: Sequence[Task], *, granularity: str, initial: Sequence[float], device: torch.device
) -> MergedModel:
    """Loads the base and puts a merged linear in the place of every adapted module; collective.

    A LLaMA-layout model is filled unit by unit and, where the recipe asks for it and there are several ranks, sharded
    before the next unit is read. Any other model is loaded whole on every rank.

    Raises:
        UserError: the base cannot be loaded, has no linear where an adapter has an update, or cannot be sharded.
    """
    with dist.together("finding the base model"):
        config = load_config(base)
        kind = model_task(base, tasks, config)
        streamed = kind == "causal_lm" and _has_llama_layout(config, base)
        if base.shard and not streamed:
            raise UserError("base_model.shard: only LLaMA-layout causal models are loaded in shards; leave it out")
    modules = list(dict.fromkeys(module for task in tasks for module in task.factors))
    rows = dict.fromkeys(module if granularity == "module" else block_of(module) for module in modules)
    coefficients = Coefficients(list(rows), initial, device=device)
    dtype = torch_dtype(base)

    def merged(name: str, linear: FrozenLinear) -> MergedLinear:
        updates = {
            number: Factors(*(side.to(device, dtype) for side in (found.lora_a, found.lora_b)))
            for number, task in enumerate(tasks)
            if (found := task.factors.get(name)) is not None
        }
        shape = (linear.out_features, linear.in_features)
        first = next(iter(updates.values()))
        if (first.lora_b.shape[0], first.lora_a.shape[1]) != shape:
            raise UserError(
                f"base_model.path {base.path}: {name} is {shape}, the adapters' update is "
                f"{(first.lora_b.shape[0], first.lora_a.shape[1])}; they belong to another base"
            )
        row = name if granularity == "module" else block_of(name)
        try:
            return MergedLinear(linear, name=name, row=row, updates=updates, coefficients=coefficients)
        except ValueError as error:
            raise UserError(f"{name}: {error}; method nsc needs trained adapters") from error

    load = _load_units if streamed else _load_whole
    root, linears = load(base, config, kind, set(modules), merged, device)
    return MergedModel(root, linears, coefficients)


Merge = Callable[[str, Any], MergedLinear]


def _has_llama_layout(config: PreTrainedConfig, base: MergeBase) -> bool:
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError:  # no causal model of this type
            return False
    inner = getattr(model, "model", None)
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    return all(hasattr(inner, part) for part in parts) and hasattr(model, "lm_head")


def _load_units(
    base: MergeBase, config: PreTrainedConfig, kind: str, wanted: set[str], merged: Merge, device: torch.device
) -> tuple[nn.Module, dict[str, MergedLinear]]:
    with dist.together("finding the base model"):
        model = build_empty(base, config)
        checkpoint = BaseFiles(locate(base))
        known = {name: m for name, m in model.named_modules() if isinstance(m, FrozenLinear)}
        _check_targets(wanted, known, base)
    sharded = base.shard and dist.world_size() > 1
    mesh = init_device_mesh(device.type, (dist.world_size(),)) if sharded else None
    root: Any = model.model
    linears: dict[str, MergedLinear] = {}
    tied = model.lm_head.weight is root.embed_tokens.weight
    for name, unit in units(model):
        if name == "lm_head":
            continue  # no ω lies behind it
        watch.progress(name)
        fill_unit(unit, name, checkpoint, device=device)
        for path in [p for p in known if p.startswith(f"{name}.") and p in wanted]:
            linears[path] = merged(path, known[path])
            model.set_submodule(path, linears[path])
        if mesh is not None and name != "model.norm" and not (tied and name == "model.embed_tokens"):
            keep_bytes(unit)
            fully_shard(unit, mesh=mesh)
    finish(model, device=device)
    if mesh is not None:
        fully_shard(root, mesh=mesh)
    return root, linears


def _load_whole(
    base: MergeBase, config: PreTrainedConfig, kind: str, wanted: set[str], merged: Merge, device: torch.device
) -> tuple[nn.Module, dict[str, MergedLinear]]:
    """Loads with transformers itself; the frozen linears keep no inputs, and are packed to 4 bits where asked."""
    dtype = torch_dtype(base)
    level = transformers.utils.logging.get_verbosity()
    with dist.together("loading the base model"):
        # A head that the checkpoint has not is drawn at random: no ω depends on it, and the report on it misleads.
        transformers.utils.logging.set_verbosity_error()
        try:
            loader: Any = getattr(transformers, AUTO_CLASSES[kind])
            model = loader.from_pretrained(
                base.path, revision=base.revision, dtype=dtype, trust_remote_code=False, use_safetensors=True
            )
        except Exception as error:  # transformers raises whatever the file format at hand raises
            raise UserError(f"base_model.path {base.path}: cannot be loaded as {kind} ({one_line(error)})") from error
        finally:
            transformers.utils.logging.set_verbosity(level)
        model.requires_grad_(False)
        linears: dict[str, MergedLinear] = {}
        plain = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        _check_targets(wanted, plain, base)
        for name, linear in plain.items():
            packed = base.quantization == "nf4" and is_in_block(name)
            if name not in wanted and not packed:
                continue
            watch.progress(name)
            if packed and linear.in_features % NF4_BLOCK:
                raise UserError(
                    f"base_model.quantization nf4: {name} reads {linear.in_features} values, no multiple of "
                    f"{NF4_BLOCK}; set base_model.quantization=none"
                )
            frozen = FrozenLinear(linear, quantized=packed, dtype=dtype)
            bias: Tensor | None = linear.bias
            frozen.fill(
                frozen.pack(linear.weight.detach().to(device)), None if bias is None else bias.detach().to(device)
            )
            if name in wanted:
                linears[name] = merged(name, frozen)
                model.set_submodule(name, linears[name])
            else:
                model.set_submodule(name, frozen)
        model.to(device)
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    # The logits of a language model's vocabulary would be its largest tensor, and no ω lies behind them.
    return (model.base_model if kind == "causal_lm" else model), linears


def _check_targets(wanted: set[str], known: Mapping[str, nn.Module], base: MergeBase) -> None:
    for name in sorted(wanted):
        if name not in known:
            raise UserError(
                f"base_model.path {base.path}: has no linear '{name}'{nearest(name, list(known))}, which the adapters "
                "have an update for; method nsc merges linears inside the model"
            )
