"""The base's config: read from its folder or the hub, and compared with the one a recipe plans with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig, PreTrainedConfig

from nslora_dist.errors import UserError

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
