"""The frozen base on the meta device: its decoder blocks, and the units it is loaded and sharded by.

It is filled unit by unit (embedding, each decoder block, final norm, head; ``base_weights.py``), so that an engine can
shard one unit before the next one is read: a rank never holds more than its shards and one block, in bfloat16 as in
4 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nslora_dist.errors import UserError
from nslora_dist.frozen import FrozenHead, FrozenLinear
from nslora_dist.nf4 import BLOCK

if TYPE_CHECKING:
    from nslora_dist.recipe import BaseModelSection


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
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=section.attention, trust_remote_code=False
            )
    except Exception as error:  # a model's own code says in many ways that its sizes do not fit each other
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"base_model.path {section.path}: no model can be built from its config ({said})") from error
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
            if quantized and linear.in_features % BLOCK:
                raise UserError(
                    f"base_model.quantization nf4: {block_name}.{name} reads {linear.in_features} values, "
                    f"no multiple of {BLOCK}; set base_model.quantization=none"
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
