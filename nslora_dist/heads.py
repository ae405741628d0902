"""The first tokens of texts that may be far longer than could ever count."""

from transformers import PreTrainedTokenizerBase

from nslora_dist.rows import token_ids

_PER_TOKEN = 16
"""Characters of text taken a token wanted; English has about four."""

_MARGIN = 256
"""Tokens before a cut that may differ from the whole text's: its last word is cut, and merges reach back a little."""


def token_heads(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, count: int | None, special: bool
) -> list[list[int]]:
    """Tokenises texts, with or without special tokens, those far too long only as far as their first tokens reach.

    A text that is much longer than ``count`` tokens is cut first; 100 MB would take minutes and gigabytes. A cut
    changes tokens just before it alone, so the first ``count`` are those of the whole text: the cut is made far behind
    them, and one at twice the length has to give the same.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        count: Tokens wanted of each; None for all.
        special: Whether the tokenizer's own special tokens are added. Those behind a text are not there after a cut.

    Returns:
        All tokens of a text, or where it was cut exactly its first ``count``.
    """
    if count is None:
        return token_ids(tokenizer, texts, special=special)
    size = count * _PER_TOKEN + 4096
    long = [number for number, text in enumerate(texts) if len(text) > 2 * size]
    if not long:
        return token_ids(tokenizer, texts, special=special)
    short = [text for text in texts if len(text) <= 2 * size]
    tokens = iter(token_ids(tokenizer, short, special=special) if short else [])
    return [
        next(tokens) if len(text) <= 2 * size else _head(tokenizer, text, count, size, special=special)
        for text in texts
    ]


def _head(tokenizer: PreTrainedTokenizerBase, text: str, count: int, size: int, *, special: bool) -> list[int]:
    (tokens,) = token_ids(tokenizer, [text[:size]], special=special)
    while size < len(text):
        size *= 2
        before = tokens
        (tokens,) = token_ids(tokenizer, [text[:size]], special=special)
        if len(before) >= count + _MARGIN and tokens[:count] == before[:count]:
            return tokens[:count]
    return tokens
