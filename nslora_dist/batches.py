"""Batches of token rows, padded or packed, as a model takes them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""The label of a position that is not scored."""
Places = tuple[Tensor, Tensor]
"""Rows and columns of tokens, each (n,) int64, in row-major order: ``x[places]`` is (n, ...).

A mask would pick the same tokens, but how many they are a GPU has to be asked for, and waited for until it has done all
that it was given.
"""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens as a model takes them: b rows, s tokens, all int64.

    Packed rows need a forward pass with ``use_cache=False``: transformers tells samples apart by ``position_ids``, but
    only where there is neither an ``attention_mask`` nor a cache.

    Attributes:
        input_ids: (b, s), padded on the right.
        attention_mask: (b, s), 0 on padding; None where nothing is padded and for packed rows.
        position_ids: (b, s), restarting at 0 for each sample of a packed row and for its padding; else None.
        labels: (b, s), not shifted: the token itself where it is scored, -100 elsewhere.
        unmasked_padding: Pad tokens that no ``attention_mask`` marks: in packed rows, and in rows that only fill up.
        samples: For each row the numbers of the samples in it, for messages; empty where nobody asked.
        places: ``predictors`` on the batch's device, once ``to`` has looked them up where the labels came from.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    labels: Tensor
    unmasked_padding: int = 0
    samples: tuple[tuple[int, ...], ...] = ()
    places: Places | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The batch, made in host memory, on a device, which is not asked for any value of it.

        The copies do not ask to be waited for either; from memory that is not pinned CUDA may wait for a large one.
        """
        mask, positions = self.attention_mask, self.position_ids
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=None if mask is None else mask.to(device, non_blocking=True),
            position_ids=None if positions is None else positions.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            places=places_on(device, self.predictors),
        )

    @property
    def predictors(self) -> Places:
        """The tokens whose next one is scored."""
        return places_of(self.labels[:, 1:] != IGNORED) if self.places is None else self.places

    @property
    def real_tokens(self) -> Places:
        """The tokens that are no padding; that behind packed samples, which nothing marks, is among them."""
        if self.token_count == 0:  # a row that only fills up
            return places_of(torch.zeros_like(self.input_ids))
        return places_of(torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask)

    @property
    def supervised_tokens(self) -> int:
        """The number of tokens that are predicted and scored."""
        return len(self.predictors[0])

    @property
    def supervised_rows(self) -> int:
        """The number of rows with a scored token: in evaluation, of questions."""
        return int((self.labels[:, 1:] != IGNORED).any(dim=1).sum())

    @property
    def token_count(self) -> int:
        """The number of tokens that are no padding."""
        marked = self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())
        return marked - self.unmasked_padding


def places_of(mask: Tensor) -> Places:
    """Where a (b, s) mask is not 0."""
    rows, columns = mask.nonzero(as_tuple=True)
    return rows, columns


def places_on(device: torch.device | str, places: Places) -> Places:
    """Places, found in host memory, on a device; this does not wait for it."""
    rows, columns = places
    return rows.to(device, non_blocking=True), columns.to(device, non_blocking=True)


def real_on(device: torch.device | str, batch: Batch) -> Places | None:
    """A batch's tokens that are no padding, found in host memory, on a device; None where all are."""
    whole = batch.attention_mask is None and batch.token_count > 0
    return None if whole else places_on(device, batch.real_tokens)


def pad_right(rows: Sequence[Tensor], value: int) -> tuple[Tensor, Tensor | None]:
    """Stacks sequences of (s,) int64 into (b, longest), filled up with ``value``.

    Returns:
        The rows, and their mask, (b, longest) int64, or None where none had to be filled up.
    """
    lengths = torch.tensor([len(row) for row in rows])
    stacked = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    mask = (torch.arange(stacked.shape[1]) < lengths[:, None]).long()
    return stacked, None if bool(mask.all()) else mask


def filler(pad: int) -> Batch:
    """One row without labels, for a rank with nothing left; unmasked, since attention over nothing is undefined."""
    return Batch(torch.full((1, 2), pad), None, None, torch.full((1, 2), IGNORED), unmasked_padding=2)


def pack(
    lengths: np.ndarray, order: Sequence[int] | np.ndarray, *, max_length: int, window: int = 64
) -> list[list[int]]:
    """Puts samples, in the order given, each into the first of the last ``window`` unfinished packs with room for it.

    Args:
        lengths: (samples,): tokens of each sample, none above ``max_length``.
        order: Sample indices.
        max_length: Tokens of a pack at most.
        window: Packs kept open.

    Returns:
        The sample indices of each pack.
    """
    packs: list[list[int]] = []
    unfinished: list[tuple[int, list[int]]] = []  # (room left, members), oldest first
    least = int(lengths.min())
    for sample in map(int, order):
        length = int(lengths[sample])
        at = next((i for i, (room, _) in enumerate(unfinished) if room >= length), None)
        room, members = (max_length, []) if at is None else unfinished.pop(at)
        if at is None:
            packs.append(members)
        members.append(sample)
        if room - length >= least:
            unfinished.insert(len(unfinished) if at is None else at, (room - length, members))
            unfinished = unfinished[-window:]
    return packs
