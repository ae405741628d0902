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


PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
"""What ``model.model`` is made of in the LLaMA layout."""
SCALES = ("embedding_multiplier", "logit_scale", "logits_scaling", "lm_head_multiplier", "mup_enabled")
"""Keys of a config that scale embeddings or logits *outside* the blocks, unless they are 1 or off."""
CAPS = ("final_logit_softcapping",)
"""The same for keys that change logits unless they are absent or null."""


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
                "with pip install -e '.[flash]' in the clone, or set base_model.attention=sdpa"
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
    _check_layout(model, section.path)
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


def _check_layout(model: PreTrainedModel, path: str) -> None:
    """Whether the base is embedding, blocks, norm and head, and nothing else is done to what goes through them.

    Calibration sends hidden states through one block at a time, and the head is called on its own: what a model's own
    forward pass does between the parts would be done once a block, or not at all.

    Raises:
        UserError: it is not; the message names what is in the way.
    """
    where, kind = f"base_model.path {path}", type(model).__name__
    remedy = "use a base of the layout of LLaMA, Mistral, Qwen 2 or Qwen 3"
    inner: Any = getattr(model, "model", None)
    if not all(hasattr(inner, part) for part in PARTS):
        raise UserError(
            f"{where}: {kind} has not the LLaMA layout (model.embed_tokens, model.layers, model.norm, "
            f"model.rotary_emb, lm_head); {remedy}"
        )
    if getattr(model.lm_head, "bias", None) is not None:
        raise UserError(f"{where}: its lm_head has a bias, which the LLaMA layout has not; {remedy}")
    for key in (*SCALES, *CAPS):
        value = getattr(model.config, key, None)
        if value is None or value is False or (key in SCALES and value == 1):
            continue
        raise UserError(
            f"{where}: its config has {key} {value}, and embeddings and logits are used here as they are, unscaled; "
            f"{remedy}"
        )
    if type(inner.embed_tokens) is not nn.Embedding:
        raise UserError(
            f"{where}: its embed_tokens, a {type(inner.embed_tokens).__name__}, does more than look tokens up; {remedy}"
        )
    for name, block in blocks(model):
        if any(parameter.dim() > 2 for parameter in block.parameters()):
            raise UserError(f"{where}: {kind}'s {name} is a mixture of experts, which is not handled; {remedy}")
    held = [name for name, part in inner.named_children() if any(True for _ in (*part.parameters(), *part.buffers()))]
    held += [name for name, _ in (*inner.named_parameters(recurse=False), *inner.named_buffers(recurse=False))]
    if more := [name for name in held if name not in PARTS]:
        raise UserError(f"{where}: {kind} has parts that the LLaMA layout has not, model.{more[0]}; {remedy}")


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
