"""A study as typed, frozen values: which bases, tasks, calibrations, arms and seeds; read from YAML like any recipe."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from nslora_dist.errors import UserError
from nslora_dist.explain import explain, nearest
from nslora_dist.recipe_adapter import AdapterSection
from nslora_dist.recipe_file import RECIPES, load_recipe_as
from nslora_dist.recipe_types import Count, Fraction, Name, Names, NonNegative, Positive, Section, Seed, Where

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
    intermediate_size: Count
    layers: Count
    heads: Count
    kv_heads: Count


class Pretraining(Section):
    """How a base is made; as ``pretrain.PretrainSettings``."""

    steps: Count = 1200
    batch_rows: Count = 192
    learning_rate: Positive = 2e-3
    facts_share: Fraction = 0.5  # of a batch; three fifths of the rest are sums, two fifths maxima


class Size(Section):
    """A base: its shape, what it knows and how it is pre-trained; ``device`` cuda leaves it out where there is none.

    ``steps`` stand for those of ``training`` where the base learns a task sooner.
    """

    shape: Shape
    people: Count = 100
    pretraining: Pretraining = Pretraining()
    device: Literal["cpu", "cuda"] = "cpu"
    seed: Seed = 0
    asked: Count = 256  # questions a piece of knowledge, and of the task
    steps: Annotated[dict[Name, Count], AfterValidator(_known_tasks)] = Field(default_factory=dict)
    minutes: Positive | None = None  # of one core, to pre-train: for estimates, as measured
    seconds: Positive | None = None  # of one core, a cell: for estimates, as measured


class TaskRows(Section):
    """Rows of the new tasks."""

    train_rows: Count = 3000
    people: Count = 20  # of the task new_facts


class StudySource(Section):
    """One source of a calibration: the pieces that its texts are drawn from, all rows alike."""

    texts: Names
    weight: Positive = 1.0

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
    sequences: Annotated[Count, Field(ge=2)] = 256  # a source

    @property
    def covered(self) -> tuple[str, ...]:
        """The pieces of knowledge that it exercises."""
        return tuple(p for p in PIECES if any(p in source.texts for source in self.sources.values()))


class StudyArm(Section):
    """A method with its grid. Either ``adapter``, as in a recipe, or a peer's initialisation by PEFT, and its rank.

    ``matched`` says what it has in common with the other arms of its comparison: trained parameters (about; the cell
    records how many) or the rank.
    """

    adapter: dict[str, Any] | None = None
    peer: Literal["pissa", "corda", "eva"] | None = None
    rank: Count | None = None
    matched: Literal["parameters", "rank", "neither"]
    learning_rates: Numbers
    weight_decays: Decays = (0.0,)

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
    """All cells of these sizes, tasks, calibrations, arms and seeds; a cell in two grids is run once.

    ``learning_rates`` and ``weight_decays``, where given, stand for those of every arm. ``along`` says what the grid
    varies, where that is no method: its summary is then a curve and not a frontier, along weight decay a table of arms.
    """

    sizes: Names
    tasks: Names
    calibrations: Names
    arms: Names
    seeds: Seeds = (0,)
    learning_rates: Numbers | None = None
    weight_decays: Decays | None = None
    along: Literal["rank", "sequences", "calibration", "budget", "weight_decay"] | None = None

    @property
    def compares(self) -> bool:
        """Whether its cells count for their arms' frontiers: a decay that was run is one that an arm may choose."""
        return self.along in (None, "weight_decay")


class StudyTraining(Section):
    """What all cells have in common."""

    steps: Annotated[dict[Name, Count], Field(min_length=1), AfterValidator(_known_tasks)]  # of each task
    batch_rows: Count = 32
    warmup_ratio: Fraction = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: Positive = 1.0


class Study(Section):
    """A study, whole."""

    name: Name
    output_dir: Where
    training: StudyTraining
    task_rows: TaskRows = TaskRows()
    probe_sequences: Count = 128
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
