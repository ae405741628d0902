"""The recipe's sections on texts: what is calibrated on, trained on and asked."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nslora_dist.recipe_types import MIXTURE, Count, Fraction, Name, Positive, Section, Seed, Where


class Texts(Section):
    """A named set of plain texts."""

    path: Where
    """A local .json, .jsonl, .ndjson or .parquet file, a local folder of such data, or a hub dataset."""
    subset: str | None = None
    """The hub dataset's configuration, where it has several; a single file has none."""
    split: str = "train"
    """Which rows, as the ``datasets`` library writes it: ``test``, ``train[:1000]``; one local file is any split."""
    text_field: str = "text"
    """The field, or column, that holds the text."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that is no UTF-8, broken JSON, or whose field is missing or no text: ``error`` stops at the first one and
    names its line, ``skip`` leaves them out and counts them in the report."""


class Source(Texts):
    """Texts whose activations shape the null space (docs/methods.md §1d)."""

    weight: Positive = 1.0
    """Of this source in the mixture, relative to the others'; each counts with its energy made equal first."""


class SolverSection(Section):
    """How null spaces are computed, those of Grams and in ``null_lora`` those of weights, and on which ranks."""

    method: Literal["eigh", "fast"] = "fast"
    """``fast`` finds the wanted directions alone, and takes ``eigh``, the whole decomposition in float64, where it
    misses its own bounds, and at once for narrow inputs and high ranks (docs/methods.md §1.2)."""
    placement: Literal["rank0", "spread"] = "rank0"
    """``rank0`` computes all; ``spread`` deals the work over the ranks, for wide models on several GPUs."""


class CalibrationSection(Section):
    """The streamed Gram pass over named sources, and probes that only measure."""

    sources: Annotated[dict[Name, Source], Field(min_length=1)]
    """Texts that exercise what is to be kept, at least one set, whatever the method: all adapters are measured on
    them."""
    probes: dict[Name, Texts] = {}
    """Texts that shape nothing: the report says how strongly each is disturbed."""
    samples: Annotated[Count, Field(ge=2)] = 256
    """Sequences of each source and probe; fewer where its rows make no more."""
    sequence_length: Count = 2048
    """Tokens of a sequence at most, to which longer rows are cut; no more than the base is made for."""
    batch_size: Count = 1
    """Sequences of a rank in one forward pass, in calibration and when an adapter is measured."""
    concatenate: bool = False
    """Joins short rows, an end-of-sequence token after each, into sequences of full length; for texts much shorter than
    ``sequence_length``."""
    heldout_fraction: Fraction = 0.125
    """Share of each source's sequences that stays out of its Grams, to measure the leak on; 0 measures none."""
    hidden_states: Literal["device", "host"] = "device"
    """Where hidden states wait between two blocks; ``host`` leaves the GPU its memory and takes longer."""
    seed: Seed = 0
    """Decides which rows are drawn, the random basis that the leak is compared with, and, in ``null_lora``, which of
    the directions that a weight's shape makes null are taken."""
    solver: SolverSection = SolverSection()

    @model_validator(mode="after")
    def _names(self) -> "CalibrationSection":
        both = sorted(set(self.sources) & set(self.probes))
        if both:
            raise ValueError(f"'{both[0]}' names a source and a probe; give the probe another name")
        for kind, named in (("source", self.sources), ("probe", self.probes)):
            if MIXTURE in named:
                raise ValueError(f"'{MIXTURE}' names the mixture of all sources; give the {kind} another name")
        return self


class PromptSet(Section):
    """Rows of a prompt and its response."""

    path: Where
    """A local .json, .jsonl, .ndjson or .parquet file, a local folder of such data, or a hub dataset."""
    subset: str | None = None
    """The hub dataset's configuration, where it has several; a single file has none."""
    split: str = "train"
    """Which rows, as the ``datasets`` library writes it: ``test``, ``train[:1000]``; one local file is any split."""
    prompt_field: str = "prompt"
    """The field, or column, that holds the prompt."""
    response_field: str = "response"
    """The field, or column, that holds the response."""
    samples: Count | None = None
    """Keeps the first so many rows that are not bad, those among them that their length leaves out later; null keeps
    all."""
    template: str = "{prompt}"
    """The text around the prompt, with ``{prompt}`` in it once; the response follows it directly."""
    on_bad_row: Literal["error", "skip"] = "error"
    """As for texts, an empty response being a bad row as well: ``error`` stops at the first one and names its line,
    ``skip`` leaves them out and counts them in the report."""

    @model_validator(mode="after")
    def _template(self) -> "PromptSet":
        if self.template.count("{prompt}") != 1:
            raise ValueError("template must hold {prompt} exactly once; the response follows it directly")
        return self


class DataSection(PromptSet):
    """What the adapter is trained on; the loss covers the response and the end-of-sequence token."""

    max_length: Count = 512
    """Tokens of a row, or of a pack, at most: longer rows are cut at the end, and left out where nothing of their
    response would remain. Without ``packing`` no more than the base is made for."""
    packing: bool = False
    """Puts several rows into one of ``max_length`` tokens, where they do not see each other; not with
    ``attention: eager``, and with flash_attention_2 only in micro-batches of 1."""
