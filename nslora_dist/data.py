"""Fine-tuning and evaluation rows: prompt and response → tokens → batches, dealt over ranks without overlap or loss.

A sample is ``tokens(template with prompt)``, with the tokenizer's own special tokens in front, ``+ tokens(response) +
eos``; the loss covers the response and eos. Training draws the same global batch whatever the number of ranks.
Calibration texts are made in ``calibration_data.py``.
"""

import hashlib
import logging
import math
from array import array
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nslora_dist.bad_rows import RowCounts, duplicates_warning, empty_response, place
from nslora_dist.batches import IGNORED, Batch, filler, pack, pad_right
from nslora_dist.errors import UserError
from nslora_dist.heads import token_heads
from nslora_dist.recipe import DataSection, PromptSet, TrainSection
from nslora_dist.rows import from_rank0, load_rows, load_tokenizer, pad_id, shuffled, token_ids

__all__ = ["Batch", "TrainingData", "evaluation_batches", "evaluation_samples", "load_rows", "load_tokenizer"]

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

    def digest(self) -> str:
        """sha256 over tokens, borders and prompt lengths."""
        digest = hashlib.sha256()
        for part, kind in ((self.tokens, "<i4"), (self.offsets, "<i8"), (self.prompt_lengths, "<i8")):
            digest.update(part.astype(kind).tobytes())
        return digest.hexdigest()


class TrainingData:
    """The training rows, tokenised, and which of them each rank sees at each step.

    Attributes:
        samples: Samples of one epoch.
        packs: Packed rows of one epoch; None without packing.
        tokens: Tokens of one epoch.
        truncated: Rows longer than ``data.max_length``, cut at the end.
        without_response: Those of them that were left out, since nothing of their response would have remained.
        bad_rows: Reason → rows that were left out for it, under ``data.on_bad_row: skip``.
        duplicates: Samples with exactly the tokens of an earlier one; they are kept.
        counts: All of what became of the rows.
        hash: sha256 over the tokenised rows.
        steps_per_epoch: Optimizer steps that show every sample once.
        total_steps: Optimizer steps of the run.
    """

    def __init__(self, samples: Samples, data: DataSection, train: TrainSection, *, pad: int) -> None:
        if not len(samples.prompt_lengths) or samples.supervised.min() < 1:
            # The loss of a global batch is divided by its supervised tokens; with one in each sample there is no zero.
            raise UserError("data: a sample without a token to predict; every one needs a prompt and a response")
        self._samples, self._train, self._pad = samples, train, pad
        self.samples = len(samples.prompt_lengths)
        self.tokens = len(samples.tokens)
        self.truncated, self.without_response = samples.counts.too_long, samples.counts.left_out
        self.counts, self.bad_rows, self.duplicates = samples.counts, samples.counts.bad, samples.counts.duplicates
        self.hash = samples.digest()
        self._packs: list[list[int]] | None = None
        self._lengths = samples.lengths  # of what a global batch counts: packs or samples
        if data.packing:
            # One packing for all epochs, which then shuffle the packs: an epoch has the same number of steps each time.
            self._packs = pack(samples.lengths, shuffled(self.samples, train.seed, 1), max_length=data.max_length)
            self._lengths = np.array([samples.lengths[members].sum() for members in self._packs])
        self.packs = None if self._packs is None else len(self._packs)
        self.steps_per_epoch = math.ceil(len(self._lengths) / train.global_batch_size)
        if train.max_steps is not None:
            self.total_steps = train.max_steps
        else:
            assert train.epochs is not None  # the recipe asks for one of the two
            self.total_steps = max(1, math.ceil(train.epochs * self.steps_per_epoch - 1e-6))

    @classmethod
    def load(cls, data: DataSection, train: TrainSection, tokenizer: PreTrainedTokenizerBase) -> "TrainingData":
        """Rank 0 reads and tokenises the rows, every rank receives them; every rank must call this.

        Raises:
            UserError: rows that cannot be read (see ``load_rows``), an empty response, or ``data.max_length`` so short
                that no response is left.
        """
        samples = from_rank0(lambda: encode(data, tokenizer, max_length=data.max_length, name="data"))
        loaded = cls(samples, data, train, pad=pad_id(tokenizer))
        packs = "" if loaded.packs is None else f" in {loaded.packs} packs"
        log.info("data: %d samples, %d tokens%s, %d steps", loaded.samples, loaded.tokens, packs, loaded.total_steps)
        return loaded

    def place(self, sample: int) -> str:
        """Where in ``data.path`` a sample of ``Batch.samples`` stands, for messages."""
        return place(int(self._samples.numbers[sample]), lines=self._samples.by_line)

    def micro_batches(self, step: int, *, rank: int, world_size: int) -> list[Batch]:
        """This rank's share of optimizer step ``step``'s global batch, counted from 0 over all epochs.

        Depends on its arguments and the recipe alone, so a run resumes anywhere, and over the ranks the batches hold
        the same samples whatever their number. An epoch's last global batch may be short: a rank with nothing left of
        it gets rows without labels. Over the ranks a step has a supervised token at least, since every sample has.

        Returns:
            ``train.accumulation(world_size)`` batches of at most ``train.micro_batch_size`` rows.

        Raises:
            UserError: the global batch does not divide over the ranks.
        """
        accumulation = self._train.accumulation(world_size)
        epoch, index = divmod(step, self.steps_per_epoch)
        size = self._train.global_batch_size
        chosen = shuffled(len(self._lengths), self._train.seed, 0, epoch)[index * size : (index + 1) * size]
        shares = _deal(chosen, self._lengths, accumulation * world_size)
        mine = [shares[pass_ * world_size + rank] for pass_ in range(accumulation)]
        if self._packs is None:
            return [_padded(self._samples, share, self._pad) for share in mine]
        return [_packed(self._samples, [self._packs[i] for i in share], self._pad) for share in mine]


def evaluation_batches(
    section: PromptSet,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    max_length: int | None = None,
    name: str = "evaluation",
) -> list[Batch]:
    """This rank's share of an evaluation set, one question a row; every rank must call this.

    Args:
        section: The rows; ``samples`` keeps the first ones.
        tokenizer: The base model's.
        batch_size: Rows per batch at most.
        rank: This rank.
        world_size: Number of ranks.
        max_length: Longer questions, answer included, are left out with a warning: half an answer proves nothing.
        name: The section's place in the recipe, for messages.

    Returns:
        As many batches on every rank; those that only fill up have no row with a label (``supervised_rows``).

    Raises:
        UserError: rows that cannot be read, an empty response, or no question left.
    """
    samples = evaluation_samples(section, tokenizer, max_length=max_length, name=name)
    return deal_evaluation(samples, tokenizer, batch_size=batch_size, rank=rank, world_size=world_size)


def evaluation_samples(
    section: PromptSet, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None, name: str = "evaluation"
) -> Samples:
    """An evaluation set on every rank, as ``evaluation_batches`` reads it; every rank must call this."""
    return from_rank0(lambda: encode(section, tokenizer, max_length=max_length, cut=False, name=name))


def deal_evaluation(
    samples: Samples, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, rank: int, world_size: int
) -> list[Batch]:
    """This rank's share of an evaluation set, as ``evaluation_batches`` deals it."""
    everything = np.arange(len(samples.prompt_lengths))
    count = math.ceil(len(everything) / (batch_size * world_size))
    shares = _deal(everything, samples.lengths, count * world_size)
    return [_padded(samples, shares[turn * world_size + rank], pad_id(tokenizer)) for turn in range(count)]


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


def _deal(chosen: np.ndarray, lengths: np.ndarray, shares: int) -> list[np.ndarray]:
    """Splits items evenly, longest first: ranks that work side by side then get rows of about one length."""
    return np.array_split(chosen[np.argsort(-lengths[chosen], kind="stable")], shares)


def _padded(samples: Samples, rows: np.ndarray, pad: int) -> Batch:
    """One sample a row."""
    if not len(rows):
        return filler(pad)
    ids, mask = pad_right([samples.ids(i) for i in rows], pad)
    labels, _ = pad_right([samples.labels(i) for i in rows], IGNORED)
    return Batch(ids, mask, None, labels, samples=tuple((int(i),) for i in rows))


def _packed(samples: Samples, packs: list[list[int]], pad: int) -> Batch:
    """One pack a row. Its padding is a sample of its own to the attention, so no row needs a mask."""
    if not packs:
        return replace(filler(pad), position_ids=torch.arange(2)[None])
    members = [[samples.ids(i) for i in pack_] for pack_ in packs]
    ids, mask = pad_right([torch.cat(parts) for parts in members], pad)
    labels, _ = pad_right([torch.cat([samples.labels(i) for i in pack_]) for pack_ in packs], IGNORED)
    positions = torch.empty_like(ids)
    for row, parts in enumerate(members):
        sizes = [len(part) for part in parts]
        sizes.append(ids.shape[1] - sum(sizes))
        positions[row] = torch.cat([torch.arange(size) for size in sizes])
    padding = 0 if mask is None else int((mask == 0).sum())
    members_of = tuple(tuple(int(i) for i in pack_) for pack_ in packs)
    return Batch(ids, None, positions, labels, unmasked_padding=padding, samples=members_of)
