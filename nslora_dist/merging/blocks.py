"""Which block a module belongs to, by its name alone: the same for any Hugging Face model."""

import re
from collections.abc import Iterable

BLOCK = re.compile(r"^(.*?\.\d+)\.")


def block_of(module: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj``; a module outside all blocks is a block by itself."""
    match = BLOCK.match(module)
    return match[1] if match else module


def is_in_block(module: str) -> bool:
    """Whether the module belongs to a numbered block."""
    return BLOCK.match(module) is not None


def target_blocks(modules: Iterable[str], fraction: float) -> set[str]:
    """The last blocks of the model that are adapted, this share of them and at least one (docs/methods.md §3.3).

    Args:
        modules: names in the model's order.
        fraction: of the numbered blocks; where there are none, of the modules.
    """
    names = list(modules)
    numbered = list(dict.fromkeys(block_of(name) for name in names if is_in_block(name)))
    ordered = numbered or list(dict.fromkeys(names))
    return set(ordered[-max(1, round(fraction * len(ordered))) :])
