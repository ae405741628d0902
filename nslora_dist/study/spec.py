"""A study as typed, frozen values: which bases, tasks, calibrations, arms and seeds; read from YAML like any recipe."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from nslora_dist.errors import UserError
from nslora_dist.explain import explain, nearest
from nslora_dist.recipe_adapter import AdapterSection
from nslora_dist.recipe_file import RECIPES, load_recipe_as
from nslora_dist.recipe_types import Count, Fraction, LocalPath, Name, Names, NonNegative, Positive, Section, Seed

STUDIES = RECIPES / "studies"
PIECES = ("facts_named", "facts_unnamed", "facts_rephrased", "sum", "maximum")
"""What a base knows, in pieces that a calibration text may or may not exercise; each is asked, and each is a probe.

``facts_named`` and ``facts_rephrased`` are about the same half of the people, in two of the three phrasings and in the
third; ``facts_unnamed`` are about the other half, in all three.
"""
FOREIGN = "foreign"
"""Words of the vocabulary in a drawn order: text that exercises no knowledge."""
TASKS = ("difference", "minimum", "new_facts")
"""What may be learned (``tiny_tasks``): a new operation in new words, one in an old word, facts in known wordings."""

AGGREGATES = ("rms", "max", "mean", "output_weighted", "writers", "first_block", "last_block", "kl")
"""What is known of a text before any evaluation: its interference, summed up in several ways (``by_depth`` is a list
beside them), and ``kl``, how far the adapted model's next-token distribution is from the base's."""

FEW = (4, 16, 64)
"""Sequences a source on which interference is measured as well, to see how few tell as much."""

Numbers = Annotated[
    tuple[Positive, ...], Field(min_length=1), BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]
Decays = Annotated[
    tuple[NonNegative, ...], Field(min_length=1), BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]
Seeds = Annotated[
    tuple[Seed, ...], Field(min_length=1), BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]


def _known_tasks(steps: dict[str, int]) -> dict[str, int]:
    for task in steps:
        if task not in TASKS:
            raise ValueError(f"no task is called '{task}'; there are {', '.join(TASKS)}")
    return steps


class Shape(Section):
    """A small LLaMA's sizes; widths are multiples of 64."""

    hidden_size: Count
    """Width of the residual stream."""
    intermediate_size: Count
    """Width inside the MLPs."""
    layers: Count
    """Decoder blocks."""
    heads: Count
    """Attention heads, which share ``hidden_size``."""
    kv_heads: Count
    """Heads of keys and values, a divisor of ``heads``."""


class Pretraining(Section):
    """How a base is made; as ``pretrain.PretrainSettings``."""

    steps: Count = 1200
    """Optimizer steps."""
    batch_rows: Count = 192
    """Rows of a step."""
    learning_rate: Positive = 2e-3
    """Peak of AdamW's rate."""
    facts_share: Fraction = 0.5
    """Of a batch; three fifths of the rest are sums, two fifths maxima."""


class Size(Section):
    """A base: its shape, what it knows and how it is pre-trained."""

    shape: Shape
    people: Count = 100
    """Whom it knows facts about, at least 2: one half is named in the texts ``facts_named``."""
    pretraining: Pretraining = Pretraining()
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it is made and its cells run, but for ``--device cuda``, which sends those of ``cpu`` there as well.
    ``cuda`` leaves it out where there is none."""
    seed: Seed = 0
    """Decides the world that it knows, its start, and the order of its rows."""
    asked: Count = 256
    """Questions on each piece of knowledge, and on the task, at most."""
    steps: Annotated[dict[Name, Count], AfterValidator(_known_tasks)] = Field(default_factory=dict)
    """Task → optimizer steps in place of those of ``training``, where the base learns it sooner."""
    minutes: Positive | None = None
    """To pre-train it, on a core or on the GPU, as measured: for estimates alone."""
    seconds: Positive | None = None
    """For a cell of the shortest of ``training.steps``, on a core or on the GPU as many share it, as measured: for
    estimates alone."""


class TaskRows(Section):
    """Rows of the new tasks."""

    train_rows: Count = 3000
    """Rows that the tasks on numbers are learned from."""
    people: Count = 20
    """Whom the task new_facts is about."""


class StudySource(Section):
    """One source of a calibration: the pieces that its texts are drawn from, all rows alike."""

    texts: Names
    """Of facts_named, facts_unnamed, facts_rephrased, sum, maximum; foreign is words in a drawn order."""
    weight: Positive = 1.0
    """Of this source in the mixture, relative to the others'."""

    @field_validator("texts")
    @classmethod
    def _known(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            if text not in (*PIECES, FOREIGN):
                raise ValueError(f"no text is called '{text}'; there are {', '.join((*PIECES, FOREIGN))}")
        return texts


class StudyCalibration(Section):
    """Texts that an adapter is calibrated on."""

    sources: Annotated[dict[Name, StudySource], Field(min_length=1)]
    """At least one, by names that no piece of knowledge has."""
    sequences: Annotated[Count, Field(ge=2)] = 256
    """Of each source."""

    @property
    def covered(self) -> tuple[str, ...]:
        """The pieces of knowledge that it exercises."""
        return tuple(p for p in PIECES if any(p in source.texts for source in self.sources.values()))


class StudyArm(Section):
    """A method with the rates and decays that it is tried at: either ``adapter``, or ``peer`` and ``rank``."""

    adapter: dict[str, Any] | None = None
    """The keys of a recipe's ``adapter``."""
    peer: Literal["pissa", "corda", "eva"] | None = None
    """An initialisation by PEFT."""
    rank: Count | None = None
    """Of a peer."""
    matched: Literal["parameters", "rank", "neither"]
    """What it has in common with the other arms of its comparison: trained parameters (about; the cell records how
    many) or the rank."""
    learning_rates: Numbers
    """Peaks of AdamW's rate."""
    weight_decays: Decays = (0.0,)
    """Each is tried with every rate."""

    @model_validator(mode="after")
    def _kind(self) -> "StudyArm":
        if (self.adapter is None) == (self.peer is None) or (self.peer is None) != (self.rank is None):
            raise ValueError("an arm has either adapter, or peer and rank")
        try:
            self.section  # noqa: B018 (it checks itself)
        except ValidationError as error:
            raise ValueError(explain(error, AdapterSection)) from error
        return self

    @property
    def section(self) -> AdapterSection:
        """The adapter, a peer's as the plain LoRA that it is beside its start."""
        tree = {"method": "lora", "rank": self.rank} if self.adapter is None else self.adapter
        return AdapterSection.model_validate(tree)

    @property
    def calibrated(self) -> bool:
        """Whether the calibration texts shape it; the others run once, with a grid's first calibration."""
        return self.peer == "corda" or self.section.method == "lora_null"


class Grid(Section):
    """All cells of these sizes, tasks, calibrations, arms and seeds; a cell in two grids is run once."""

    sizes: Names
    """Of the study's ``sizes``."""
    tasks: Names
    """Of difference, minimum and new_facts."""
    calibrations: Names
    """Of the study's ``calibrations``; an arm that is not calibrated runs with the first one alone."""
    arms: Names
    """Of the study's ``arms``."""
    seeds: Seeds = (0,)
    """Of the order of rows and of a random A; the rows themselves are drawn by the size's seed."""
    learning_rates: Numbers | None = None
    """In place of every arm's own."""
    weight_decays: Decays | None = None
    """In place of every arm's own."""
    along: Literal["rank", "sequences", "calibration", "budget", "weight_decay"] | None = None
    """What the grid varies, where that is no method: its summary is then a curve and no frontier, along weight decay a
    table of arms."""

    @property
    def compares(self) -> bool:
        """Whether its cells count for their arms' frontiers: a decay that was run is one that an arm may choose."""
        return self.along in (None, "weight_decay")


class StudyTraining(Section):
    """What all cells have in common."""

    steps: Annotated[dict[Name, Count], Field(min_length=1), AfterValidator(_known_tasks)]
    """Task → optimizer steps, for every task of a grid."""
    batch_rows: Count = 32
    """Rows of a step."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the rate rises linearly to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate goes on behind the warm-up: down to zero by a cosine or a line, or as it is."""
    max_grad_norm: Positive = 1.0
    """Norm over all trained parameters to which a step's gradient is clipped."""


class Study(Section):
    """A study, whole."""

    name: Name
    """Of the study."""
    output_dir: LocalPath
    """What is written here does not count: ``--output`` does, or ``studies/`` and the file's name."""
    training: StudyTraining
    task_rows: TaskRows = TaskRows()
    probe_sequences: Count = 128
    """Sequences of each piece of knowledge that interference and divergence are measured on."""
    sizes: Annotated[dict[Name, Size], Field(min_length=1)]
    calibrations: Annotated[dict[Name, StudyCalibration], Field(min_length=1)]
    arms: Annotated[dict[Name, StudyArm], Field(min_length=1)]
    grids: Annotated[dict[Name, Grid], Field(min_length=1)]

    def steps_of(self, size: Size, task: str) -> int:
        """Optimizer steps of a task on a base."""
        return size.steps.get(task, self.training.steps[task])

    @model_validator(mode="after")
    def _names(self) -> "Study":
        kinds: dict[str, list[str]] = {
            "sizes": list(self.sizes),
            "tasks": list(TASKS),
            "calibrations": list(self.calibrations),
            "arms": list(self.arms),
        }
        for grid, values in self.grids.items():
            for kind, known in kinds.items():
                for name in getattr(values, kind):
                    if name not in known:
                        raise ValueError(
                            f"grids.{grid}.{kind}: there is no '{name}'{nearest(name, known)}; "
                            f"there is {', '.join(known)}"
                        )
            for task in values.tasks:
                if task not in self.training.steps:
                    raise ValueError(f"training.steps: says nothing of {task}, which grids.{grid} trains; add it")
        for name, calibration in self.calibrations.items():
            for source in calibration.sources:
                if source in PIECES:
                    raise ValueError(f"calibrations.{name}.sources.{source}: is a probe's name; choose another")
        return self


def load_study(name: str, output: Path | None = None) -> Study:
    """Reads a study by its name in ``recipes/studies/`` or by its path.

    Args:
        name: of the study.
        output: its folder, ``studies/<name>`` where left out.

    Raises:
        UserError: as ``recipe_file.load_recipe``.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else STUDIES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in STUDIES.glob("*.yaml"))
        raise UserError(f"--study {name}: no such study{nearest(name, known)}; recipes/studies/ has {', '.join(known)}")
    folder = output if output is not None else Path("studies") / path.stem
    return load_recipe_as(Study, str(path)).model_copy(update={"output_dir": str(folder)})
