"""What the cells of one base share in a worker process: rows, texts, null spaces, PEFT's starts, the base's scores."""

import json
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nslora_dist import artifacts
from nslora_dist.arm_job import make_job
from nslora_dist.base_config import load_config
from nslora_dist.base_files import BaseFiles
from nslora_dist.base_model import build_empty
from nslora_dist.calibration.run import Calibration
from nslora_dist.calibration.store import NullSpace
from nslora_dist.calibration.weights import WeightNullSpace, weight_null_spaces
from nslora_dist.calibration_data import CalibrationTexts, calibration_texts
from nslora_dist.data import TrainingData, load_tokenizer
from nslora_dist.engines import start_engine
from nslora_dist.engines.base import Job
from nslora_dist.evaluate import EvaluationSets, evaluate
from nslora_dist.input_groups import InputGroup, input_groups, target_groups
from nslora_dist.recipe import Recipe
from nslora_dist.recipe_adapter import AdapterSection
from nslora_dist.rows import pad_id
from nslora_dist.samples import Samples, encode
from nslora_dist.study.bases import locked
from nslora_dist.study.cells import Cell, base_folder
from nslora_dist.study.knowledge import source_texts, write_texts
from nslora_dist.study.peers import PeerStart, peer_job, peer_starts, peft_model
from nslora_dist.study.spec import PIECES, Study, StudyArm

EVALUATED_AT_ONCE = 128
EVA_BATCHES = 64


class Bench:
    """One base and whatever its cells have in common, made when first asked for."""

    def __init__(self, study: Study, size: str, *, device: torch.device) -> None:
        """The base must be there (``bases.make_base``)."""
        self.study, self.size, self.device = study, size, device
        self.folder = base_folder(study, size)
        self.checkpoint = BaseFiles(self.folder / "base")
        self.base_hash = self.checkpoint.fingerprint()[:16]
        self.made: dict[str, Any] = {}

    def _once(self, key: tuple[Any, ...], make: Any) -> Any:
        name = repr(key)
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def recipe(self, cell: Cell) -> Recipe:
        """The cell as a recipe: what ``launch/train.py`` would be given."""
        arm, training = self.study.arms[cell.arm], self.study.training
        steps = self.study.steps_of(self.study.sizes[self.size], cell.task)
        rows = self.folder / "data"
        calibration = self.study.calibrations[cell.calibration]
        return Recipe.model_validate(
            {
                "name": cell.id,
                "base_model": {"path": str(self.folder / "base"), "dtype": "float32"},
                "calibration": {
                    "sources": {
                        name: {"path": self._source(cell.calibration, name), "weight": source.weight}
                        for name, source in calibration.sources.items()
                    },
                    "probes": {piece: {"path": str(rows / f"text_{piece}.jsonl")} for piece in PIECES},
                    "samples": max(calibration.sequences, self.study.probe_sequences),
                    "sequence_length": 64,
                    "batch_size": 64,
                    "heldout_fraction": 0.0,
                },
                "adapter": arm.section.model_dump(exclude_unset=True),
                "data": {"path": str(rows / f"{cell.task}_train.jsonl"), "max_length": 64},
                "train": {
                    "learning_rate": cell.learning_rate,
                    "weight_decay": cell.weight_decay,
                    "max_steps": steps,
                    "global_batch_size": training.batch_rows,
                    "micro_batch_size": training.batch_rows,
                    "warmup_ratio": training.warmup_ratio,
                    "schedule": training.schedule,
                    "max_grad_norm": training.max_grad_norm,
                    "seed": cell.seed,
                    "log_every": steps,
                },
                "engine": {"name": "single"},
                "evaluation": {
                    "batch_size": EVALUATED_AT_ONCE,
                    "adaptation": {"path": str(rows / f"{cell.task}_test.jsonl")},
                    "retention": {piece: {"path": str(rows / f"asked_{piece}.jsonl")} for piece in PIECES},
                },
                "output_dir": str(self.folder),
            }
        )

    def _source(self, calibration: str, source: str) -> str:
        """The file of a source's texts, written where it is not there yet."""
        wanted = self.study.calibrations[calibration]
        pieces = wanted.sources[source].texts
        path = self.folder / "data" / f"source_{artifacts.hash_json(pieces)[:12]}.jsonl"

        def write() -> str:
            with locked(path.with_suffix(".lock")):
                if not path.is_file():
                    texts = {piece: self._texts_of(piece) for piece in pieces}
                    fresh = path.with_suffix(".partial")
                    write_texts(fresh, source_texts(texts, wanted, source))
                    fresh.replace(path)
            return str(path)

        return str(self._once(("source", pieces), write))

    def _texts_of(self, piece: str) -> list[str]:
        lines = (self.folder / "data" / f"text_{piece}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]

    @cached_property
    def config(self) -> Any:
        """The base's configuration."""
        return load_config(self._any_recipe.base_model)

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return load_tokenizer(self._any_recipe.base_model)

    @cached_property
    def _any_recipe(self) -> Recipe:
        study = self.study
        task, calibration, arm = (next(iter(named)) for named in (study.training.steps, study.calibrations, study.arms))
        return self.recipe(Cell("any", (), self.size, task, calibration, arm, 1e-3, 0.0, 0))

    def groups(self, adapter: AdapterSection) -> list[InputGroup]:
        """The targets' input groups."""
        every = self._once(("groups",), lambda: input_groups(build_empty(self._any_recipe.base_model, self.config)))
        return target_groups(every, adapter)

    def texts(self, cell: Cell) -> list[CalibrationTexts]:
        """The calibration's sources and the probes, each cut to its number of sequences."""
        sequences, probed = self.study.calibrations[cell.calibration].sequences, self.study.probe_sequences

        def read() -> list[CalibrationTexts]:
            return [
                CalibrationTexts(
                    text.name,
                    text.weight,
                    text.calibration[: probed if text.weight is None else sequences],
                    [],
                    text.hash,
                    text.truncated,
                    text.counts,
                )
                for text in calibration_texts(self.recipe(cell).calibration, self.tokenizer)
            ]

        return self._once(("texts", cell.calibration), read)

    def data(self, cell: Cell) -> TrainingData:
        """The task's rows, in the order of the cell's seed."""
        recipe = self.recipe(cell)

        def read() -> Samples:
            return encode(recipe.data, self.tokenizer, max_length=recipe.data.max_length, name="data")

        samples = self._once(("rows", cell.task), read)
        return TrainingData(samples, recipe.data, recipe.train, pad=pad_id(self.tokenizer))

    def sets(self, cell: Cell) -> EvaluationSets:
        """The questions of the task and of every piece of knowledge."""
        return self._once(
            ("asked", cell.task), lambda: EvaluationSets.load(self.recipe(cell).evaluation, self.tokenizer)
        )

    def base_scores(self, cell: Cell) -> dict[str, Any]:
        """What the base itself answers, in the arithmetic that every adapter runs in."""

        def score() -> dict[str, Any]:
            recipe = self.recipe(cell).model_copy(update={"adapter": AdapterSection(method="lora", rank=1)})
            job = make_job(recipe, self.config, self.checkpoint, self.groups(recipe.adapter), None, device=self.device)
            return evaluate(start_engine(job, recipe), self.sets(cell), device=self.device)

        return self._once(("base", cell.task), score)

    def job(self, cell: Cell) -> Job:
        """The cell's model and how it is filled."""
        arm, recipe = self.study.arms[cell.arm], self.recipe(cell)
        if arm.peer is not None:
            empty = build_empty(recipe.base_model, self.config)
            return peer_job(empty, self._peer(cell, arm), self.checkpoint, device=self.device)
        start: NullSpace | WeightNullSpace | None = None
        if recipe.adapter.method == "lora_null":
            start = self._null_space(cell, recipe)
        elif recipe.adapter.method == "null_lora":
            start = self._weight_null_space(recipe)
        groups = self.groups(recipe.adapter)
        return make_job(recipe, self.config, self.checkpoint, groups, start, device=self.device)

    def _null_space(self, cell: Cell, recipe: Recipe) -> NullSpace:
        def calibrate() -> NullSpace:
            return Calibration(
                build_empty(recipe.base_model, self.config),
                self.checkpoint,
                self.groups(recipe.adapter),
                section=recipe.calibration,
                adapter=recipe.adapter,
                device=self.device,
            ).run(self.texts(cell))

        return self._once(("null space", cell.calibration, recipe.adapter), calibrate)

    def _weight_null_space(self, recipe: Recipe) -> WeightNullSpace:
        def decompose() -> WeightNullSpace:
            return weight_null_spaces(
                build_empty(recipe.base_model, self.config),
                self.checkpoint,
                self.groups(recipe.adapter),
                adapter=recipe.adapter,
                section=recipe.calibration,
                device=self.device,
            )

        wanted = (recipe.adapter.null_dim, recipe.adapter.null_threshold, recipe.adapter.target_modules)
        return self._once(("weights", wanted), decompose)

    def _peer(self, cell: Cell, arm: StudyArm) -> dict[str, PeerStart]:
        def start() -> dict[str, PeerStart]:
            assert arm.peer is not None and arm.rank is not None
            torch.manual_seed(cell.seed)
            rows = self.data(cell)
            sequences: list[Tensor] = [s for t in self.texts(cell) if t.weight is not None for s in t.calibration]
            steps = range(min(EVA_BATCHES, rows.total_steps))
            batches = [b for step in steps for b in rows.micro_batches(step, rank=0, world_size=1)]
            made = peft_model(
                self.folder / "base",
                arm.peer,
                rank=arm.rank,
                sequences=sequences,
                batches=batches,
                device=self.device,
            )
            return peer_starts(made)

        depends = {"pissa": (), "corda": (cell.calibration,), "eva": (cell.task, cell.seed)}[str(arm.peer)]
        return self._once((arm.peer, arm.rank, depends), start)
