"""The root module that engines wrap: a causal LM asked only for what the supervised tokens need."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nslora_dist.batches import Batch


class SupervisedModel(nn.Module):
    """Next-token loss in training, greedy exact match in evaluation; logits exist at supervised positions alone."""

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
        """
        hidden = self.model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        labels = batch.labels[:, 1:]
        keep = labels != -100
        supervised = hidden[:, :-1][keep]
        if self.training:
            return self.model.lm_head(supervised, labels[keep])
        right = torch.zeros_like(keep)
        right[keep] = self.model.lm_head(supervised).argmax(-1) == labels[keep]
        return (right == keep).all(1) & keep.any(1)
