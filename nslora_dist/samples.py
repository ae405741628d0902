"""Prompts with their responses → tokens, once, on rank 0.

A sample is ``tokens(template with prompt)``, with the tokenizer's own special tokens in front, ``+ tokens(response) +
eos``; the loss covers the response and eos.
"""

import hashlib
import logging
from array import array
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nslora_dist import watch
from nslora_dist.bad_rows import RowCounts, duplicates_warning, empty_response
from nslora_dist.batches import IGNORED
from nslora_dist.errors import UserError
from nslora_dist.heads import token_heads
from nslora_dist.recipe_data import PromptSet
from nslora_dist.rows import load_rows, token_ids

log = logging.getLogger("nslora_dist")

_CHUNK = 1000  # rows tokenised at a time


@dataclass(frozen=True)
class Samples:
    """Tokenised rows in flat arrays: sample i is ``tokens[offsets[i]:offsets[i + 1]]``.

    Attributes:
        tokens: (all tokens,), int32.
        offsets: (samples + 1,), int64.
        prompt_lengths: (samples,), int64: tokens before the response.
        numbers: (samples,), int64: the line or row of ``data.path`` that each sample comes from.
        by_line: Whether they are lines, counted from 1, or rows, counted from 0.
        counts: What became of all rows. Rows longer than the maximum length are left out where cutting was not asked
            for, or would leave nothing of the response.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    numbers: np.ndarray
    by_line: bool
    counts: RowCounts

    @property
    def lengths(self) -> np.ndarray:
        """(samples,), int64: tokens per sample."""
        return np.diff(self.offsets)

    def ids(self, index: int) -> Tensor:
        """Sample ``index``, (s,) int64."""
        return torch.from_numpy(self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64))

    def labels(self, index: int) -> Tensor:
        """Its labels, (s,) int64. The first token never has one: in a pack, the sample before would predict it."""
        labels = self.ids(index)
        labels[: max(1, int(self.prompt_lengths[index]))] = IGNORED
        return labels

    @property
    def supervised(self) -> np.ndarray:
        """(samples,), int64: tokens of each sample that are predicted and scored."""
        return self.lengths - np.maximum(1, self.prompt_lengths)

    @cached_property
    def hash(self) -> str:
        """sha256 over tokens, borders and prompt lengths; once, whoever trains on them."""
        digest = hashlib.sha256()
        for part, kind in ((self.tokens, "<i4"), (self.offsets, "<i8"), (self.prompt_lengths, "<i8")):
            digest.update(part.astype(kind).tobytes())
        return digest.hexdigest()


def encode(
    section: PromptSet, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, name: str, cut: bool = True
) -> Samples:
    """Reads and tokenises prompts with their responses.

    Rows longer than ``max_length`` are counted and cut at the end; they are left out where ``cut`` is off, or nothing
    of the response would remain.

    Raises:
        UserError: rows that cannot be read, an empty response, or no row left.
    """
    prompt_field, response_field = section.prompt_field, section.response_field
    rows = load_rows(section, [prompt_field, response_field], name=name, filled=[response_field])
    # One more than fits, so that it shows; BOS may stand twice and eos behind, which prompt_ids takes away.
    count = None if max_length is None else max_length + 3
    tokens, lengths, prompt_lengths, numbers = array("i"), array("q"), array("q"), array("q")
    seen: set[bytes] = set()
    too_long = left_out = 0
    for chosen, chunk in rows.chunks(np.arange(len(rows)), rows=_CHUNK):
        watch.progress(f"{name}, {chosen[0]} of {len(rows)} rows tokenised")
        texts = [section.template.replace("{prompt}", text) for text in chunk[prompt_field]]
        prompts = prompt_ids(tokenizer, texts, count=count)
        responses = token_heads(tokenizer, chunk[response_field], count=count, special=False)
        for row, prompt, response in zip(chosen, prompts, responses, strict=True):
            if not response:
                rows.tally.add(int(rows.numbers[row]), empty_response(response_field))
                continue
            sample = array("i", [*prompt, *response, tokenizer.eos_token_id])
            if max_length is not None and len(sample) > max_length:
                too_long += 1
                if not cut or max_length <= max(1, len(prompt)):  # a prompt alone has no scored token
                    left_out += 1
                    continue
                sample = sample[:max_length]
            tokens.extend(sample)
            lengths.append(len(sample))
            prompt_lengths.append(len(prompt))
            numbers.append(int(rows.numbers[row]))
            seen.add(hashlib.blake2b(sample.tobytes(), digest_size=16, salt=len(prompt).to_bytes(8, "little")).digest())
    rows.tally.warn()
    if too_long:
        said = "%s: %d of %d rows are longer than %d tokens: %d cut at the end, %d left out"
        log.warning(said, name, too_long, len(rows), max_length, too_long - left_out, left_out)
    if not lengths and not too_long:
        raise UserError(f"{rows.tally.where}: no usable row is left: {rows.tally.summary()}; mend the data")
    if not lengths:
        raise UserError(
            f"{name}.path {section.path}: no row fits into {max_length} tokens with a response; raise max_length"
        )
    duplicates = len(lengths) - len(seen)
    duplicates_warning(name, duplicates, len(lengths))
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))])
    return Samples(
        np.array(tokens, np.int32),
        offsets,
        np.array(prompt_lengths, np.int64),
        np.array(numbers, np.int64),
        rows.tally.lines,
        RowCounts(rows.read, dict(rows.tally.counts), duplicates, too_long, left_out),
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, count: int | None = None) -> list[list[int]]:
    """Tokenises the part before the response: the tokenizer's special tokens in front, none behind, no BOS twice.

    Of texts that are far longer than ``count`` tokens, there are at least the first ``count - 2``.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain, whole = (token_ids(tokenizer, ["a"], special=special)[0] for special in (False, True))
    closes = whole[-1:] == [eos] and plain[-1:] != [eos]  # some append eos to whatever they tokenise
    found = [ids[:-1] if closes else ids for ids in token_heads(tokenizer, texts, count=count, special=True)]
    return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in found]
