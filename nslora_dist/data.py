"""Fine-tuning and evaluation rows: samples → batches, dealt over ranks without overlap or loss.

Training draws the same global batch whatever the number of ranks. How a row becomes tokens is in ``samples.py``;
calibration texts are made in ``calibration_data.py``.
"""

import logging
import math
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from nslora_dist.bad_rows import place
from nslora_dist.batches import IGNORED, Batch, filler, pack, pad_right
from nslora_dist.errors import UserError
from nslora_dist.recipe import TrainSection
from nslora_dist.recipe_data import DataSection, PromptSet
from nslora_dist.rows import from_rank0, load_rows, load_tokenizer, pad_id, shuffled
from nslora_dist.samples import Samples, encode

__all__ = ["Batch", "TrainingData", "evaluation_batches", "evaluation_samples", "load_rows", "load_tokenizer"]

log = logging.getLogger("nslora_dist")


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
        self._samples, self._data, self._train, self._pad = samples, data, train, pad
        self.samples = len(samples.prompt_lengths)
        self.tokens = len(samples.tokens)
        self.truncated, self.without_response = samples.counts.too_long, samples.counts.left_out
        self.counts, self.bad_rows, self.duplicates = samples.counts, samples.counts.bad, samples.counts.duplicates
        self.hash = samples.hash
        self._packs: list[list[int]] | None = None
        self._lengths = samples.lengths  # of what a global batch counts: packs or samples
        self._shuffled = -1, np.zeros(0, np.int64)
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

    @property
    def largest_token(self) -> int:
        """Of all rows."""
        return int(self._samples.tokens.max())

    def dealt_by(self, train: TrainSection) -> "TrainingData":
        """The same rows as another training sees them, not read again."""
        return TrainingData(self._samples, self._data, train, pad=self._pad)

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
        chosen = self._order(epoch)[index * size : (index + 1) * size]
        shares = _deal(chosen, self._lengths, accumulation * world_size)
        mine = [shares[pass_ * world_size + rank] for pass_ in range(accumulation)]
        if self._packs is None:
            return [_padded(self._samples, share, self._pad) for share in mine]
        return [_packed(self._samples, [self._packs[i] for i in share], self._pad) for share in mine]

    def _order(self, epoch: int) -> np.ndarray:
        """An epoch's order, kept from step to step: of ten million rows it takes half a second, a GPU waiting."""
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, shuffled(len(self._lengths), self._train.seed, 0, epoch)
        return self._shuffled[1]


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
