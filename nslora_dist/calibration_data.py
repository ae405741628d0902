"""Calibration texts: the rows that shape the null space (sources) or only measure it (probes), as token sequences."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nslora_dist.bad_rows import RowCounts, duplicates_warning
from nslora_dist.batches import IGNORED, Batch, pad_right
from nslora_dist.errors import UserError
from nslora_dist.heads import token_heads
from nslora_dist.recipe_data import CalibrationSection, Source, Texts
from nslora_dist.rows import Rows, from_rank0, load_rows, shuffled

log = logging.getLogger("nslora_dist")

_CHUNK = 256  # rows tokenised at a time


@dataclass(frozen=True)
class CalibrationTexts:
    """The sequences of one source or probe, each (s,) int64 with s <= ``calibration.sequence_length``.

    Attributes:
        name: Its name in the recipe.
        weight: The source's weight in the mixture; None for a probe.
        calibration: Sequences to accumulate; all of them for a probe.
        heldout: Sequences kept back to measure the leak on; none for a probe.
        hash: sha256 over the token ids, lengths and the split in two.
        truncated: Rows longer than ``sequence_length``, of which the start is used.
        counts: What became of the rows. Those longer than ``sequence_length`` and duplicates are counted among the
            rows drawn: reading stops at ``calibration.samples`` sequences.
        origins: In which line or row each sequence begins, those of ``calibration`` first, for messages; empty where
            nobody knows.
    """

    name: str
    weight: float | None
    calibration: list[Tensor]
    heldout: list[Tensor]
    hash: str
    truncated: int
    counts: RowCounts = field(default_factory=RowCounts)
    origins: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Where it stands in the recipe."""
        return f"calibration.{'probes' if self.weight is None else 'sources'}.{self.name}"

    @property
    def largest_token(self) -> int:
        """Of all sequences."""
        return max(int(sequence.max()) for sequence in (*self.calibration, *self.heldout))


def calibration_texts(section: CalibrationSection, tokenizer: PreTrainedTokenizerBase) -> list[CalibrationTexts]:
    """Reads and tokenises every source, then every probe, in recipe order; every rank must call this.

    A row of exactly ``sequence_length`` tokens is used as it is and a longer one is cut to its first
    ``sequence_length`` tokens, neither with special tokens. A shorter one gets the tokenizer's own special tokens; with
    ``concatenate`` such rows are joined, an end-of-sequence token after each, into full sequences. Rows without any
    token are passed over.

    Raises:
        UserError: rows that cannot be read (see ``load_rows``), or none with any text in it.
    """
    named: list[tuple[str, Texts]] = [(f"calibration.sources.{name}", s) for name, s in section.sources.items()]
    named += [(f"calibration.probes.{name}", probe) for name, probe in section.probes.items()]
    return from_rank0(lambda: [_read(where, texts, section, tokenizer) for where, texts in named])


def text_batches(sequences: Sequence[Tensor], *, batch_size: int, rank: int, world_size: int) -> list[Batch]:
    """This rank's sequences, ``sequences[rank::world_size]`` in order, padded on the right and without labels.

    There may be none for a rank, and numbers of batches differ between ranks.
    """
    mine = sequences[rank::world_size]
    batches = []
    for start in range(0, len(mine), batch_size):
        ids, mask = pad_right(mine[start : start + batch_size], 0)
        batches.append(Batch(ids, mask, None, torch.full_like(ids, IGNORED)))
    return batches


def _read(
    where: str, texts: Texts, section: CalibrationSection, tokenizer: PreTrainedTokenizerBase
) -> CalibrationTexts:
    rows = load_rows(texts, [texts.text_field], name=where)
    rows.tally.warn()
    sequences, numbers, counts = _sequences(rows, section, tokenizer, where=where)
    if not sequences:
        raise UserError(
            f"{where}.path {texts.path}: field '{texts.text_field}' is empty in every row; name another field"
        )
    if len(sequences) < section.samples:
        log.warning("%s: %d sequences asked for, its rows make %d", where, section.samples, len(sequences))
    if counts.too_long:
        log.info("%s: %d rows are longer than %d tokens and were cut", where, counts.too_long, section.sequence_length)
    is_source = isinstance(texts, Source)
    kept_back = _heldout_count(len(sequences), section.heldout_fraction) if is_source else 0
    split = len(sequences) - kept_back
    return CalibrationTexts(
        name=where.rpartition(".")[2],
        weight=texts.weight if isinstance(texts, Source) else None,
        calibration=sequences[:split],
        heldout=sequences[split:],
        hash=_digest(sequences, split),
        truncated=counts.too_long,
        counts=counts,
        origins=[rows.tally.place(number) for number in numbers],
    )


def _heldout_count(count: int, fraction: float) -> int:
    if fraction == 0 or count < 2:
        return 0
    return min(count - 1, max(1, round(fraction * count)))


def _sequences(
    rows: Rows, section: CalibrationSection, tokenizer: PreTrainedTokenizerBase, *, where: str
) -> tuple[list[Tensor], list[int], RowCounts]:
    """The first ``samples`` sequences that the shuffled rows make, the rows they begin in, and the counts of rows."""
    length = section.sequence_length
    found: list[list[int]] = []
    begun: list[int] = []
    joined: list[int] = []
    joined_from: list[int] = []  # the row of each of these tokens
    seen: set[bytes] = set()
    drawn = truncated = 0
    for number, plain, whole in _tokenised(rows, shuffled(len(rows), section.seed), tokenizer, length=length):
        if not plain:
            continue
        drawn += 1
        seen.add(hashlib.blake2b(np.array(plain[:length], dtype="<i8").tobytes(), digest_size=16).digest())
        if len(plain) >= length:
            truncated += len(plain) > length
            found.append(plain[:length])
            begun.append(number)
        elif not section.concatenate:
            found.append(whole[:length])
            begun.append(number)
        else:
            joined += whole if whole[-1] == tokenizer.eos_token_id else [*whole, tokenizer.eos_token_id]
            joined_from += [number] * (len(joined) - len(joined_from))
            while len(joined) >= length and len(found) < section.samples:
                found.append(joined[:length])
                begun.append(joined_from[0])
                del joined[:length], joined_from[:length]
        if len(found) == section.samples:
            break
    else:
        if joined and not found:
            found.append(joined)
            begun.append(joined_from[0])
        elif joined:
            log.info("%s: the last %d joined tokens make no full sequence and are left out", where, len(joined))
    duplicates_warning(where, drawn - len(seen), drawn)
    counts = RowCounts(rows.read, dict(rows.tally.counts), drawn - len(seen), truncated)
    return [torch.tensor(ids, dtype=torch.int64) for ids in found], begun, counts


def _tokenised(
    rows: Rows, order: np.ndarray, tokenizer: PreTrainedTokenizerBase, *, length: int
) -> Iterator[tuple[int, list[int], list[int]]]:
    """Each row's number, and its tokens without and with the tokenizer's special tokens, a chunk at a time.

    Of a row that is longer than ``length`` there may be only the first ``length + 1`` tokens without special ones.
    """
    for chosen, chunk in rows.chunks(order, rows=_CHUNK):
        (texts,) = chunk.values()
        plain = token_heads(tokenizer, texts, count=length + 1, special=False)
        short = [text if len(ids) < length else "" for text, ids in zip(texts, plain, strict=True)]
        whole = token_heads(tokenizer, short, count=length + 1, special=True)
        yield from zip(rows.numbers[chosen].tolist(), plain, whole, strict=True)


def _digest(sequences: Sequence[Tensor], split: int) -> str:
    digest = hashlib.sha256(np.array([split, *map(len, sequences)], dtype="<i8").tobytes())
    for ids in sequences:
        digest.update(ids.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
