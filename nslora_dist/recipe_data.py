"""The recipe's sections on texts and rows: what is calibrated on, what is trained on, what is asked."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nslora_dist.recipe_types import MIXTURE, Count, Fraction, Name, Positive, Section, Seed, Where

OnBadRow = Literal["error", "skip"]


class Texts(Section):
    """A named set of plain texts: a hub dataset, or a local JSON, JSONL or Parquet file."""

    path: Where
    """A local file or folder, or a dataset's name on the hub."""
    subset: str | None = None
    """The dataset's configuration, where it has several."""
    split: str = "train"
    """Of a dataset, with slices as in ``train[:1000]``; a local file is whatever split is named."""
    text_field: str = "text"
    """The field that holds the text."""
    on_bad_row: OnBadRow = "error"
    """At a row that is not UTF-8, broken JSON or no object, or whose field is missing, null or not text: stop and name
    it, or leave it out and count it in the report."""


class Source(Texts):
    """Texts whose activations shape the null space (docs/methods.md §1d)."""

    weight: Positive = 1.0
    """Share in the mixture of all sources, which is balanced whatever their lengths."""


class SolverSection(Section):
    """How the r smallest eigenpairs of each Gram matrix are found, and on which ranks."""

    method: Literal["eigh", "fast"] = "fast"
    """``eigh`` decomposes in float64; ``fast`` finds the wanted pairs alone and falls back on ``eigh`` where its own
    check is not met."""
    placement: Literal["rank0", "spread"] = "rank0"
    """Who solves: rank 0, or each group's own rank, which takes the solver off one rank's time."""


class CalibrationSection(Section):
    """The streamed Gram pass over named sources, and probes that only measure."""

    sources: Annotated[dict[Name, Source], Field(min_length=1)]
    """Texts that exercise what must be kept, by name; nothing else is protected."""
    probes: dict[Name, Texts] = {}
    """Further texts, by name, on which interference and divergence are reported and which shape nothing."""
    samples: Annotated[Count, Field(ge=2)] = 256
    """Sequences of each source and probe."""
    sequence_length: Count = 2048
    """Tokens a sequence at most. A row of exactly so many is used as it is, with no special token added."""
    batch_size: Count = 1
    """Sequences a rank and forward pass; also of the passes that measure interference."""
    concatenate: bool = False
    """Join short rows, an end-of-sequence token after each, into sequences of full length."""
    heldout_fraction: Fraction = 0.125
    """Share of every source that does not shape the null space: the leak is measured on it."""
    hidden_states: Literal["device", "host"] = "device"
    """Where the activations between two blocks wait; ``host`` takes them off the GPU's memory."""
    seed: Seed = 0
    """Of the choice of rows, and of random null bases to compare with."""
    solver: SolverSection = SolverSection()
    """How the null spaces are found."""

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
    """Rows of a prompt and its response: a hub dataset, or a local JSON, JSONL or Parquet file."""

    path: Where
    """A local file or folder, or a dataset's name on the hub."""
    subset: str | None = None
    """The dataset's configuration, where it has several."""
    split: str = "train"
    """Of a dataset, with slices as in ``train[:1000]``; a local file is whatever split is named."""
    prompt_field: str = "prompt"
    """The field that holds the prompt."""
    response_field: str = "response"
    """The field that holds the response."""
    samples: Count | None = None
    """The first so many rows; all where it is left out."""
    template: str = "{prompt}"
    """Text around the prompt, with ``{prompt}`` in it once; the response follows it directly."""
    on_bad_row: OnBadRow = "error"
    """As for texts; an empty response is bad as well."""

    @model_validator(mode="after")
    def _template(self) -> "PromptSet":
        if self.template.count("{prompt}") != 1:
            raise ValueError("template must hold {prompt} exactly once; the response follows it directly")
        return self


class DataSection(PromptSet):
    """What the adapter is trained on; the loss covers the response and the end-of-sequence token."""

    max_length: Count = 512
    """Tokens a sample at most, the longer are cut; with ``packing`` those of a pack."""
    packing: bool = False
    """Several samples a row, which do not see each other."""
