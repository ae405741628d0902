"""The base's config: read from its folder or the hub, and compared with the one a recipe plans with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig, PreTrainedConfig

from nslora_dist.errors import UserError
from nslora_dist.explain import hub_reason
from nslora_dist.named import is_local

if TYPE_CHECKING:
    from nslora_dist.recipe import BaseModelSection

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
MOST_BLOCKS = 10_000
"""Of a model; a config that asks for more is damaged, and building it would take for ever."""


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


def check_context(config: PreTrainedConfig, key: str, length: int) -> None:
    """Whether rows of ``length`` tokens, which the recipe's ``key`` allows, are within what the base was made for.

    Positions beyond it have a rotary embedding as well, but one that the model has never seen.

    Raises:
        UserError: they are not; the message has both numbers.
    """
    context = context_of(config)
    if context is not None and length > context:
        raise UserError(
            f"{key} {length}: the base is made for {context} tokens (max_position_embeddings in its config); "
            f"set {key}={context} at most"
        )


def check_tokens(config: PreTrainedConfig, path: str, largest: Mapping[str, int]) -> None:
    """Whether the base's embedding has a row for every token of the texts.

    A tokenizer may hold tokens that were added to it and not to the base, as long as no text has them.

    Args:
        config: the base's.
        path: ``base_model.path``.
        largest: the texts' place in the recipe → their largest token.

    Raises:
        UserError: it has not; on a GPU the look-up would end in an assertion that names nothing.
    """
    rows = getattr(config, "vocab_size", None)
    for key, token in largest.items():
        if isinstance(rows, int) and token >= rows:
            raise UserError(
                f"{key}: the tokenizer in {path} gives token {token}, and the base's embedding has {rows} rows; use "
                "the tokenizer that came with the base, or enlarge the base (resize_token_embeddings) and save it"
            )


def context_of(config: PreTrainedConfig) -> int | None:
    """Positions that the base is made for, a scaled rotary embedding's counted; None where its config does not say."""
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if not isinstance(factor, int | float):
        return most
    return max(most, int(factor * (original if isinstance(original, int) else most)))


def _read_config(section: BaseModelSection, path: str, key: str) -> PreTrainedConfig:
    if is_local(path, key=key) and not Path(path).is_dir():
        raise UserError(f"{key} {path}: no such folder")
    revision = section.revision if key == "base_model.path" else None
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        if not raw.get("auto_map"):
            config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
            _check_sizes(config)
            return config
    except Exception as error:
        raise UserError(f"{key} {path}: its config.json cannot be loaded ({hub_reason(error)})") from error
    raise UserError(
        f"{key} {path}: its config.json asks for code of its own (auto_map), and code that comes with a model is never "
        "run; use a model whose classes transformers has, and take auto_map out of a copy's config.json"
    )


def _check_sizes(config: PreTrainedConfig) -> None:
    for key in SIZES:
        value = getattr(config, key, None)
        if isinstance(value, int) and not isinstance(value, bool) and not 0 < value < 2**31:
            raise ValueError(f"{key} is {value}")
    if not 0 < (getattr(config, "num_hidden_layers", None) or 1) <= MOST_BLOCKS:
        raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}")
