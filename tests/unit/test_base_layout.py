"""A base whose forward pass is not embedding, blocks, norm and head is refused where its config is read."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.world import FAMILIES, SMALL, make_recipe
from nslora_dist.base_config import check_context
from nslora_dist.base_model import build_empty
from nslora_dist.dry_run import describe
from nslora_dist.errors import UserError
from nslora_dist.recipe import BaseModelSection


def empty(name: str, **changes: Any) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**(SMALL | changes))
    return build_empty(BaseModelSection(path="there", dtype="float32", attention="eager"), config)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("Granite", {"embedding_multiplier": 12.0}, "embedding_multiplier 12.0"),
        ("Granite", {"logits_scaling": 8.0}, "logits_scaling 8.0"),
        ("Cohere", {}, "logit_scale 0.0625"),
        ("Gemma", {}, "embed_tokens, a GemmaTextScaledWordEmbedding"),
        ("Gemma2", {}, "final_logit_softcapping 30.0"),
        ("Gemma2", {"final_logit_softcapping": None}, "embed_tokens, a Gemma2TextScaledWordEmbedding"),
        ("GPT2", {}, "has not the LLaMA layout"),
        ("Mixtral", {"num_local_experts": 2}, "model.layers.0 is a mixture of experts"),
        ("Qwen3Moe", {"num_experts": 2, "moe_intermediate_size": 64}, "model.layers.0 is a mixture of experts"),
    ],
)
def test_what_is_done_between_the_parts_is_refused(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match="base_model.path there: ") as caught:
        empty(name, **changes)
    assert said in str(caught.value) and "LLaMA, Mistral, Qwen 2 or Qwen 3" in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_is_supported_is_taken(family: str) -> None:
    name, settings = FAMILIES[family]
    assert len(empty(name, **settings).model.layers) == 2


def test_scales_inside_blocks_and_neutral_ones_are_taken() -> None:
    neutral = {"embedding_multiplier": 1.0, "logits_scaling": 1}
    assert len(empty("Granite", residual_multiplier=0.22, attention_multiplier=0.1, **neutral).model.layers) == 2


def test_a_further_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = transformers.LlamaModel.__init__

    def with_more(self: Any, *args: Any, **more: Any) -> None:
        made(self, *args, **more)
        self.embed_positions = torch.nn.Embedding(8, 64)

    monkeypatch.setattr(transformers.LlamaModel, "__init__", with_more)
    with pytest.raises(UserError, match=r"parts that the LLaMA layout has not, model\.embed_positions"):
        empty("Llama")


@pytest.mark.parametrize("key", ["calibration.sequence_length", "data.max_length"])
def test_rows_longer_than_the_context_are_refused(tmp_path: Path, key: str) -> None:
    transformers.LlamaConfig(**SMALL).save_pretrained(tmp_path / "base")
    section, name = key.split(".")

    def dry_run(length: int, **data: Any) -> None:
        changes: dict[str, Any] = {"data": data}
        changes[section] = changes.get(section, {}) | {name: length}
        describe(make_recipe(tmp_path, tmp_path / "base", tmp_path / "run", **changes))

    dry_run(256)
    with pytest.raises(UserError, match=rf"{key} 257: .* made for 256 tokens .* set {key}=256 at most"):
        dry_run(257)
    if key == "data.max_length":  # a pack of shorter rows
        dry_run(257, packing=True)


def test_a_scaled_rotary_embedding_has_a_longer_context() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
    config = transformers.LlamaConfig(**(SMALL | {"rope_parameters": yarn}))
    check_context(config, "data.max_length", 1024)
    with pytest.raises(UserError, match="made for 1024 tokens"):
        check_context(config, "data.max_length", 1025)


def test_the_dry_run_refuses_too(tmp_path: Path) -> None:
    transformers.GraniteConfig(**(SMALL | {"logits_scaling": 8.0})).save_pretrained(tmp_path / "base")
    recipe = make_recipe(tmp_path, tmp_path / "base", tmp_path / "run")
    with pytest.raises(UserError, match=r"logits_scaling 8\.0"):
        describe(recipe)
