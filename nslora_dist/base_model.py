"""The frozen base: which linears and input groups it has, and its weights, one unit at a time.

The model is built on the meta device and filled unit by unit (embedding, each decoder block, final norm, head) straight
from safetensors, so that an engine can shard one unit before the next one is read: a rank never holds more than its
shards and one block, in bfloat16 as in 4 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nslora_dist import nf4
from nslora_dist.adapter import Adapter
from nslora_dist.base_files import Checkpoint
from nslora_dist.errors import UserError
from nslora_dist.explain import nearest
from nslora_dist.linear import LowRank, frozen_linear, head_loss
from nslora_dist.nf4 import BLOCK as NF4_BLOCK

if TYPE_CHECKING:
    from nslora_dist.recipe import AdapterSection, BaseModelSection

SIZES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
"""What two configs of one model agree on: everything that a shape depends on."""


@dataclass(frozen=True)
class LinearShape:
    """A linear inside a decoder block: its name there and its sizes."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class InputGroup:
    """Linears of one block that read the same tensor; they share one Gram matrix and one null space.

    ``name`` is that of its first module with the block's prefix, e.g. ``model.layers.3.self_attn.q_proj``.
    """

    name: str
    modules: tuple[LinearShape, ...]

    @property
    def in_features(self) -> int:
        """d_in, the width of the shared input."""
        return self.modules[0].in_features


class FrozenLinear(nn.Module):
    """A linear without gradient, dense or packed to 4 bits; it keeps no activations for backward.

    ``watch``, where set, is given every product W x before bias and update are added: only inside this module's own
    forward pass is a sharded bias whole, and taking one off again afterwards would cost digits.
    """

    def __init__(self, linear: nn.Linear, *, quantized: bool, dtype: torch.dtype) -> None:
        """Takes the shape of ``linear`` on the meta device; ``fill`` gives it values."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quantized = quantized
        self.dtype = dtype
        self.quant_state: Any = None
        self.watch: Callable[[Tensor], None] | None = None
        shape: tuple[int, ...] = (self.out_features, self.in_features)
        if quantized:
            # Two values a byte, stored as the engine's parameter dtype so that shards mix with bfloat16 ones.
            shape = (self.out_features * self.in_features // 2 // dtype.itemsize, 1)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        self.bias = None
        if linear.bias is not None:
            empty = torch.empty(self.out_features, dtype=dtype, device="meta")
            self.bias = nn.Parameter(empty, requires_grad=False)

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Takes (d_out, d_in) and (d_out,) values on their final device, and packs the weight if this is 4-bit."""
        if self.quantized:
            weight, self.quant_state = nf4.pack(weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def dense(self, weight: Tensor) -> Tensor:
        """The stored (gathered) weight as (d_out, d_in) in the base's dtype; no copy if it is dense already."""
        if not self.quantized:
            return weight
        return nf4.unpack(weight.data, self.quant_state)

    def forward(self, x: Tensor, *, update: LowRank | None = None) -> Tensor:
        """(..., d_in) → (..., d_out), an adapter's update added."""
        unpack = self.dense if self.quantized else None
        if self.watch is not None:
            product = frozen_linear(x, self.weight, None, unpack=unpack)
            self.watch(product)
            if update is None:
                return product if self.bias is None else product + self.bias
        return frozen_linear(x, self.weight, self.bias, unpack=unpack, update=update)


class FrozenHead(nn.Module):
    """The output head without gradient: a summed loss where labels are given, logits otherwise."""

    def __init__(self, weight: nn.Parameter) -> None:
        """Takes the head's (vocabulary, d) weight, tied or not."""
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """(n, d) → () float32 Σ −log p(label), or (n, vocabulary) logits."""
        if labels is None:
            return nn.functional.linear(hidden, self.weight)
        return head_loss(hidden, self.weight, labels)


class PassThrough(nn.Module):
    """Stands in for a decoder block that is not to run."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """Returns its input."""
        return hidden_states


def load_config(section: BaseModelSection) -> PreTrainedConfig:
    """The config that came with the checkpoint.

    Raises:
        UserError: there is none, or ``base_model.config`` describes a model of another size.
    """
    config = _read_config(section, section.path, "base_model.path")
    if section.config is not None:
        planned = _read_config(section, section.config, "base_model.config")
        for key in SIZES:
            ours, theirs = getattr(planned, key, None), getattr(config, key, None)
            if ours != theirs:
                raise UserError(
                    f"base_model.config {section.config}: {key} is {ours}, and {theirs} in the checkpoint's own config "
                    f"({section.path}); leave base_model.config out, or give the folder of this model"
                )
    return config


def planning_config(section: BaseModelSection) -> PreTrainedConfig:
    """The config for a dry run: ``base_model.config`` where it is given, so that no checkpoint is needed.

    Raises:
        UserError: there is none.
    """
    if section.config is None:
        return load_config(section)
    return _read_config(section, section.config, "base_model.config")


def _read_config(section: BaseModelSection, path: str, key: str) -> PreTrainedConfig:
    if path.startswith(("/", ".")) and not Path(path).is_dir():
        raise UserError(f"{key} {path}: no such folder")
    revision = section.revision if key == "base_model.path" else None
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=section.trust_remote_code)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{key} {path}: its config.json cannot be loaded ({first})") from error


def torch_dtype(section: BaseModelSection) -> torch.dtype:
    """The dtype the base computes in and is stored in."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[section.dtype]


def build_empty(section: BaseModelSection, config: PreTrainedConfig) -> PreTrainedModel:
    """The base on the meta device, its blocks' linears replaced by frozen ones.

    Raises:
        UserError: not of the LLaMA layout, an attention that is not installed, or sizes that NF4 cannot pack.
    """
    if section.attention == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            raise UserError(
                "base_model.attention flash_attention_2: the package is not usable here; on a CUDA machine install it "
                "with pip install 'nslora_dist[flash]', or set base_model.attention=sdpa"
            )
    dtype = torch_dtype(section)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=section.attention,
            trust_remote_code=section.trust_remote_code,
        )
    inner = getattr(model, "model", None)
    if not all(hasattr(inner, part) for part in ("embed_tokens", "layers", "norm", "rotary_emb")):
        raise UserError(
            f"base_model.path {section.path}: {type(model).__name__} has not the LLaMA layout "
            "(model.embed_tokens, model.layers, model.norm, model.rotary_emb, lm_head)"
        )
    if getattr(model.lm_head, "bias", None) is not None:
        raise UserError(f"base_model.path {section.path}: its lm_head has a bias, which the LLaMA layout has not")
    model.lm_head = FrozenHead(model.lm_head.weight)
    model.requires_grad_(False)
    model.config.use_cache = False
    for block_name, block in blocks(model):
        for name, linear in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
            quantized = section.quantization == "nf4"
            if quantized and linear.in_features % NF4_BLOCK:
                raise UserError(
                    f"base_model.quantization nf4: {block_name}.{name} reads {linear.in_features} values, "
                    f"no multiple of {NF4_BLOCK}; set base_model.quantization=none"
                )
            block.set_submodule(name, FrozenLinear(linear, quantized=quantized, dtype=dtype))
    return model


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks and their names."""
    inner: Any = model.model  # nn.Module types its attributes as "Tensor | Module"
    return [(f"model.layers.{number}", block) for number, block in enumerate(inner.layers)]


def units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What is loaded and sharded as a whole, in the order of the forward pass; a tied head is no unit of its own."""
    inner: Any = model.model
    head: Any = model.lm_head
    tied = head.weight is inner.embed_tokens.weight
    return [
        ("model.embed_tokens", inner.embed_tokens),
        *blocks(model),
        ("model.norm", inner.norm),
        *([] if tied else [("lm_head", head)]),
    ]


@torch.no_grad()
def input_groups(model: PreTrainedModel) -> list[InputGroup]:
    """The input groups of every block, found by watching which linears of it receive the same tensor.

    Every block runs once on the meta device, where a forward pass costs nothing at any size.
    """
    received: list[tuple[Tensor, str, FrozenLinear]] = []
    hooks = []
    for block_name, block in blocks(model):
        for name, module in block.named_modules():
            if isinstance(module, Adapter):
                raise AssertionError("groups are found on the base, before adapters are attached")
            if isinstance(module, FrozenLinear):
                full = f"{block_name}.{name}"
                hooks.append(module.register_forward_pre_hook(functools.partial(_receive, received, full)))
                module.forward = functools.partial(_meta_product, module)  # type: ignore[method-assign]
    hidden = torch.empty(1, 4, model.config.hidden_size, dtype=model.dtype, device="meta")
    # A ready 4-dimensional mask, or transformers would ask the meta tensors for values.
    mask = torch.empty(1, 1, 4, 4, dtype=torch.bool, device="meta")
    positions = torch.empty(1, 4, dtype=torch.int64, device="meta")
    rotary = model.model.rotary_emb(hidden, position_ids=positions)
    for _, block in blocks(model):
        block(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary, use_cache=False)
    for hook in hooks:
        hook.remove()
    members: dict[int, list[LinearShape]] = {}
    for tensor, name, module in received:  # the list keeps the tensors alive, so that no id is used twice
        members.setdefault(id(tensor), []).append(LinearShape(name, module.in_features, module.out_features))
        module.__dict__.pop("forward", None)
    return [InputGroup(modules[0].name, tuple(modules)) for modules in members.values()]


def _receive(received: list[tuple[Tensor, str, FrozenLinear]], name: str, module: FrozenLinear, args: Any) -> None:
    received.append((args[0], name, module))


def _meta_product(module: FrozenLinear, x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], module.out_features)


def target_groups(groups: list[InputGroup], adapter: AdapterSection) -> list[InputGroup]:
    """The groups with the modules that the recipe adapts, by the last part of their names.

    Raises:
        UserError: a target that no block has, or a rank above a target's width.
    """
    known = sorted({shape.name.rsplit(".", 1)[1] for group in groups for shape in group.modules})
    for target in adapter.target_modules:
        if target not in known:
            raise UserError(
                f"adapter.target_modules: the model has no linear '{target}'{nearest(target, known)}; "
                f"its blocks have {', '.join(known)}"
            )
    chosen = []
    for group in groups:
        modules = tuple(shape for shape in group.modules if shape.name.rsplit(".", 1)[1] in adapter.target_modules)
        if not modules:
            continue
        if adapter.rank > group.in_features:
            raise UserError(
                f"adapter.rank {adapter.rank} is above the {group.in_features} inputs of {modules[0].name}; "
                f"use adapter.rank={group.in_features} at most"
            )
        chosen.append(InputGroup(modules[0].name, modules))
    return chosen


def fill_unit(unit: nn.Module, name: str, checkpoint: Checkpoint, *, device: torch.device) -> None:
    """Reads one unit's base weights onto ``device``, packing 4-bit ones; adapters are left alone."""
    for path, module in _base_modules(unit, name):
        if isinstance(module, FrozenLinear):
            shape = (module.out_features, module.in_features)
            weight = checkpoint.read(f"{path}.weight", shape, dtype=module.dtype, device=device)
            bias = None
            if module.bias is not None:
                bias = checkpoint.read(f"{path}.bias", (module.out_features,), dtype=module.dtype, device=device)
            module.fill(weight, bias)
            continue
        for key, old in list(module.named_parameters(recurse=False)):
            full = f"{path}.{key}"
            value = checkpoint.read(full, tuple(old.shape), dtype=old.dtype, device=device)
            setattr(module, key, nn.Parameter(value, requires_grad=False))


def _base_modules(unit: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The unit's modules by their names in the checkpoint, which knows nothing of adapters."""
    for path, module in unit.named_modules():
        full = f"{name}.{path}" if path else name
        if isinstance(module, Adapter):
            continue
        yield full.removesuffix(".base"), module


def empty_unit(unit: nn.Module) -> None:
    """Puts a unit's parameters back on the meta device."""
    for module in unit.modules():
        for key, old in list(module.named_parameters(recurse=False)):
            empty = nn.Parameter(torch.empty_like(old, device="meta"), requires_grad=old.requires_grad)
            setattr(module, key, empty)
        if isinstance(module, FrozenLinear):
            module.quant_state = None


def fill_rotary(model: PreTrainedModel, *, device: torch.device) -> None:
    """Computes the rotary frequencies on the device: buffers that no checkpoint holds."""
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)


def finish(model: PreTrainedModel, *, device: torch.device) -> None:
    """Gives a filled model what no unit holds: rotary frequencies, and a tied head."""
    fill_rotary(model, device=device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
