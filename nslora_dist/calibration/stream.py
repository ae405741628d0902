"""One decoder block at a time: its weights are read once, all of the rank's sequences go through it, it is released."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nslora_dist.base_files import Checkpoint
from nslora_dist.base_model import PassThrough, blocks, empty_unit, fill_rotary, fill_unit
from nslora_dist.calibration.grams import Collector
from nslora_dist.data import Batch


class Texts:
    """This rank's batches of one source or probe, and their hidden states before the current block."""

    def __init__(self, name: str, batches: Sequence[Batch], *, device: torch.device, keep: torch.device) -> None:
        """Batches of token ids; ``keep`` is where hidden states wait between blocks."""
        self.name = name
        self.batches = [batch.to(device) for batch in batches]
        self.hidden: list[Tensor] = []
        self.keep = keep


class BlockStream:
    """Runs texts through a checkpoint's blocks in order, with one block's weights in memory.

    The model's own forward code makes masks and rotary embeddings: it is called on ready hidden states with every
    other block passed over, so sliding windows, head layouts and the like need no table here.
    """

    def __init__(
        self, model: PreTrainedModel, checkpoint: Checkpoint, *, device: torch.device, place: Literal["device", "host"]
    ) -> None:
        """``model`` is empty (on the meta device) and stays so but for what is in use."""
        self.model = model
        self.checkpoint = checkpoint
        self.device = device
        self.keep = device if place == "device" else torch.device("cpu")
        self.blocks = blocks(model)
        model.model.norm = PassThrough()
        fill_rotary(model, device=device)

    @torch.no_grad()
    def embed(self, texts: Sequence[Texts]) -> None:
        """Token ids → the hidden states before block 0."""
        embedding = self.model.model.embed_tokens
        fill_unit(embedding, "model.embed_tokens", self.checkpoint, device=self.device)
        for text in texts:
            text.hidden = [embedding(batch.input_ids).to(self.keep) for batch in text.batches]
        empty_unit(embedding)

    @contextmanager
    def block(self, number: int) -> Iterator[nn.Module]:
        """Block ``number`` with its weights on the device."""
        name, block = self.blocks[number]
        fill_unit(block, name, self.checkpoint, device=self.device)
        self.model.model.layers = nn.ModuleList(
            block if position == number else PassThrough() for position in range(len(self.blocks))
        )
        try:
            yield block
        finally:
            self.model.model.layers = nn.ModuleList(module for _, module in self.blocks)
            empty_unit(block)

    @torch.no_grad()
    def run(self, texts: Texts, collector: Collector) -> None:
        """All batches of ``texts`` through the current block, their hidden states replaced by its output."""
        for number, batch in enumerate(texts.batches):
            collector.start_batch(number, batch)
            texts.hidden[number] = self.model.model(
                inputs_embeds=texts.hidden[number].to(self.device),
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state.to(self.keep)
