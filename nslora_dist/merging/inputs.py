"""The few unlabelled inputs of each task: texts as token ids, or ready model inputs from a safetensors file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nslora_dist.artifacts import load_tensors
from nslora_dist.batches import pad_right
from nslora_dist.errors import UserError
from nslora_dist.heads import token_heads
from nslora_dist.merge_recipe import Inputs, MergeBase
from nslora_dist.rows import from_rank0, load_rows, one_line, shuffled


@dataclass(frozen=True)
class TaskInputs:
    """Inputs of one task, on the CPU.

    Attributes:
        sequences: (s,) int64 token ids each, of any lengths; none where ``tensors`` holds the inputs.
        tensors: the model's arguments by name, one input a row.
    """

    sequences: Sequence[Tensor]
    tensors: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        """How many inputs."""
        return len(self.sequences) or len(next(iter(self.tensors.values())))

    def batch(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        """The model's arguments for these inputs, and the mask of their tokens where they can differ in length."""
        if self.sequences:
            ids, mask = pad_right([self.sequences[row] for row in rows], 0)
            mask = torch.ones_like(ids) if mask is None else mask
            return {"input_ids": ids, "attention_mask": mask}, mask
        chosen = {name: tensor[list(rows)] for name, tensor in self.tensors.items()}
        mask = chosen.get("attention_mask")
        return chosen, mask if mask is not None and mask.ndim == 2 else None

    def tokens(self, rows: Sequence[int]) -> int:
        """Σ of the mask over these inputs, 0 where there is none."""
        mask = self.batch(rows)[1]
        return 0 if mask is None else int(mask.sum())


def read_inputs(sections: Mapping[str, Inputs], base: MergeBase, *, seed: int) -> dict[str, TaskInputs]:
    """Reads every task's inputs, the same on every rank; collective.

    Raises:
        UserError: rows or tensors that cannot be read, or a tokenizer that is needed and not there.
    """

    def make() -> dict[str, TaskInputs]:
        tokenizer = None
        found = {}
        for name, section in sections.items():
            if section.path.endswith(".safetensors"):
                found[name] = _ready(f"inputs.{name}", section)
                continue
            tokenizer = tokenizer or _tokenizer(base)
            found[name] = _texts(f"inputs.{name}", section, tokenizer, seed=seed)
        return found

    return from_rank0(make)


def _ready(where: str, section: Inputs) -> TaskInputs:
    tensors = load_tensors(Path(section.path))
    counts = {len(tensor) if tensor.ndim else 0 for tensor in tensors.values()}
    if len(counts) != 1 or counts == {0}:
        raise UserError(f"{where}.path {section.path}: every tensor needs the same number of rows, at least one")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}.path {section.path}: '{name}' has values that are not finite; make it again")
    return TaskInputs((), {name: tensor[: section.samples].clone() for name, tensor in tensors.items()})


def _texts(where: str, section: Inputs, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> TaskInputs:
    rows = load_rows(section, [section.text_field], name=where)
    rows.tally.warn()
    sequences: list[Tensor] = []
    for _, chunk in rows.chunks(shuffled(len(rows), seed), rows=section.samples):
        for ids in token_heads(tokenizer, chunk[section.text_field], count=section.max_length, special=True):
            if ids and len(sequences) < section.samples:
                sequences.append(torch.tensor(ids[: section.max_length], dtype=torch.int64))
        if len(sequences) == section.samples:
            break
    if not sequences:
        raise UserError(
            f"{where}.path {section.path}: field '{section.text_field}' is empty in every row; name another field"
        )
    return TaskInputs(sequences, {})


def _tokenizer(base: MergeBase) -> PreTrainedTokenizerBase:
    # Not the one of training: an encoder's tokenizer has no end-of-sequence token, and none is needed here.
    try:
        return AutoTokenizer.from_pretrained(base.path, revision=base.revision, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the file format at hand raises
        raise UserError(
            f"base_model.path {base.path}: no tokenizer could be loaded ({one_line(error)}); inputs.<name>.path may "
            "also be a .safetensors file of ready model inputs"
        ) from error
