"""The root module that engines wrap: a causal LM asked only for what the supervised tokens need."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from nslora_dist.batches import IGNORED, Batch, Places, places_of, places_on


@dataclass(frozen=True)
class Scored(Batch):
    """Asks evaluation mode how likely the labels are, and not only whether greedy decoding gives them."""


@dataclass(frozen=True)
class Offered(Batch):
    """Asks evaluation mode how likely each of several next tokens is behind a row; ``labels`` are not read.

    Attributes:
        options: (b, most) int64 on the CPU, filled up with -100.
    """

    options: Tensor | None = None


@dataclass(frozen=True)
class Continued(Batch):
    """Asks evaluation mode for the most likely next token; the one batch that is padded on the *left*.

    ``input_ids`` are what ``cache`` does not know yet, ``attention_mask`` is over all tokens, ``labels`` are not read.

    Attributes:
        cache: keys and values of the tokens so far; the forward pass adds to it.
    """

    cache: Cache | None = None


@dataclass(frozen=True)
class Compared(Batch):
    """Asks evaluation mode for hidden states, or how far the next tokens are from those of other hidden states.

    ``labels`` are not read.

    Attributes:
        real: the tokens that count, on the batch's device; None for all.
        against: (b, s, d), as an earlier pass gave them; None asks for hidden states.
    """

    real: Places | None = None
    against: Tensor | None = None


class SupervisedModel(nn.Module):
    """Next-token loss in training, greedy exact match in evaluation; logits exist at supervised positions alone.

    Behind the blocks nothing asks a GPU for a value: it would have to finish them all before it were even told of the
    head, and the head's weight, where it is sharded, would not be gathered before.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Wraps ``model``, whose own names then start with ``model.``."""
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """One batch.

        Args:
            batch: (b, s) tokens; ``labels`` are not shifted.

        Returns:
            In training mode () float32: the negative log-likelihood *summed* over supervised tokens, for the caller to
            divide by the tokens of the whole global batch. In evaluation mode (b,) bool: whether greedy decoding after
            the prompt gives exactly the labelled response. That is read off one pass: it does if and only if every
            label is the argmax given the labels before it. False for rows without labels.
            In evaluation mode, of a ``Scored`` batch (b, 2) float64: the log-likelihood summed over a row's labels, and
            1 where every one of them is the argmax; of an ``Offered`` one (b, most, 2) float64: the same of each
            option, 0 where there is none; of a ``Continued`` one (b,) int64: the next tokens; of a ``Compared`` one
            (b, s, d) hidden states, or (2,) float64: the divergence in nats, summed over tokens, and their number.
        """
        if isinstance(batch, Continued):
            return self._next(batch)
        if isinstance(batch, Compared):
            return self._compared(batch)
        if isinstance(batch, Offered):
            return self._offered(batch)
        scored = isinstance(batch, Scored)
        # Whoever scores a row of one token more than the model is made for is not to run it past its end.
        seen, mask = (slice(None, -1) if scored else slice(None)), batch.attention_mask
        hidden = self.model.model(
            input_ids=batch.input_ids[:, seen],
            attention_mask=None if mask is None else mask[:, seen],
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        places = batch.predictors
        following = batch.labels[:, 1:]
        supervised, labels = hidden[places], following[places]
        if self.training:
            return self.model.lm_head(supervised, labels)
        keep = following != IGNORED
        if scored:
            found = self.model.lm_head(supervised, labels, by_token=True).double()
            by_row = torch.zeros(*keep.shape, 2, dtype=torch.float64, device=hidden.device)
            by_row[places] = found
            return torch.stack([by_row[..., 0].sum(1), (by_row[..., 1].sum(1) == keep.sum(1)).double()], dim=1)
        right = torch.zeros_like(keep)
        right[places] = self.model.lm_head(supervised).argmax(-1) == labels
        return (right == keep).all(1) & keep.any(1)

    def _next(self, batch: Continued) -> Tensor:
        hidden = self.model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            past_key_values=batch.cache,
            use_cache=True,
        ).last_hidden_state
        return self.model.lm_head(hidden[:, -1]).argmax(-1)

    def _offered(self, batch: Offered) -> Tensor:
        assert batch.options is not None
        hidden: Tensor = self.model.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        there = places_on(hidden.device, places_of(batch.options != IGNORED))
        options = batch.options.to(hidden.device, non_blocking=True)
        last = (batch.attention_mask.sum(1) if batch.attention_mask is not None else hidden.shape[1]) - 1
        rows = torch.arange(len(hidden), device=hidden.device)
        behind = hidden[rows, last][:, None].expand(-1, options.shape[1], -1)
        found = torch.zeros(*options.shape, 2, dtype=torch.float64, device=hidden.device)
        found[there] = self.model.lm_head(behind[there], options[there], by_token=True).double()
        return found

    def _compared(self, batch: Compared) -> Tensor:
        hidden: Tensor = self.model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        if batch.against is None:
            return hidden
        ours, theirs = (
            states.flatten(0, 1) if batch.real is None else states[batch.real] for states in (hidden, batch.against)
        )
        by_token = self.model.lm_head(ours, against=theirs).double()
        return torch.stack([by_token.sum(), by_token.new_full((), len(by_token))])
