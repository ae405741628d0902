"""One decoder block at a time: its weights are read once, all of the rank's sequences go through it, it is released."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nslora_dist.base_files import BaseFiles
from nslora_dist.base_model import blocks
from nslora_dist.base_weights import empty_unit, fill_rotary, fill_unit, return_freed_memory
from nslora_dist.batches import Batch, real_on
from nslora_dist.calibration.grams import Collector
from nslora_dist.frozen import PassThrough


class Texts:
    """This rank's batches of one source or probe, and their hidden states before the next block they go through."""

    def __init__(
        self,
        name: str,
        batches: Sequence[Batch],
        *,
        device: torch.device,
        keep: torch.device,
        place: str = "",
        origins: Sequence[Sequence[str]] = (),
    ) -> None:
        """Batches of token ids, made in host memory.

        Args:
            name: of the source or probe.
            batches: this rank's.
            device: where they run.
            keep: where hidden states wait between blocks.
            place: where it stands in the recipe, for messages.
            origins: for each batch in which lines or rows its sequences begin, for messages.
        """
        self.name = name
        self.place = place
        self.origins = origins
        self.real = [real_on(device, batch) for batch in batches]
        self.batches = [batch.to(device) for batch in batches]
        self.hidden: list[Tensor] = []
        self.keep = keep


class BlockStream:
    """Runs texts through a checkpoint's blocks in order, with only the loaded blocks' weights in memory.

    The model's own forward code makes masks and rotary embeddings: it is called on ready hidden states with every
    other block passed over, so sliding windows, head layouts and the like need no table here.
    """

    def __init__(
        self, model: PreTrainedModel, checkpoint: BaseFiles, *, device: torch.device, place: Literal["device", "host"]
    ) -> None:
        """``model`` is empty (on the meta device) and stays so but for what is loaded."""
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

    def load(self, number: int) -> None:
        """Reads block ``number`` onto the device."""
        name, block = self.blocks[number]
        fill_unit(block, name, self.checkpoint, device=self.device)

    def release(self, number: int) -> None:
        """Frees block ``number``."""
        empty_unit(self.blocks[number][1])
        return_freed_memory()  # or a deep model's blocks would pile up in the C library's free lists

    @torch.no_grad()
    def run(self, number: int, texts: Texts, collector: Collector) -> None:
        """All batches of ``texts`` through block ``number``, their hidden states replaced by its output."""
        name, block = self.blocks[number]
        inner = self.model.model
        inner.layers = nn.ModuleList(block if n == number else PassThrough() for n in range(len(self.blocks)))
        try:
            with collector.attached(block, prefix=name):
                for position, batch in enumerate(texts.batches):
                    collector.start_batch(position, texts.real[position])
                    texts.hidden[position] = inner(
                        inputs_embeds=texts.hidden[position].to(self.device),
                        attention_mask=batch.attention_mask,
                        position_ids=batch.position_ids,
                        use_cache=False,
                    ).last_hidden_state.to(self.keep)
        finally:
            inner.layers = nn.ModuleList(module for _, module in self.blocks)
