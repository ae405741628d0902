"""The one place that knows the whole way: recipe → null space → adapter → training → adapter on disk → report."""

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nslora_dist import artifacts, dist, watch
from nslora_dist.arm_job import Arm, make_job
from nslora_dist.arm_stage import RunContext, run_arm
from nslora_dist.base_config import check_context, check_tokens, context_of, load_config
from nslora_dist.base_files import BaseFiles, locate
from nslora_dist.base_model import build_empty
from nslora_dist.budget import check_references
from nslora_dist.calibration import store
from nslora_dist.calibration.parts import Parts
from nslora_dist.calibration.run import Calibration
from nslora_dist.calibration.store import NullSpace
from nslora_dist.calibration.weights import WeightNullSpace, reuse_or_make
from nslora_dist.calibration_data import calibration_texts
from nslora_dist.clock import Clock
from nslora_dist.data import TrainingData, load_tokenizer
from nslora_dist.engines.base import Job
from nslora_dist.errors import UserError
from nslora_dist.evaluate import EvaluationSets
from nslora_dist.input_groups import InputGroup, input_groups, target_groups
from nslora_dist.plan.check import check
from nslora_dist.plan.shapes import shapes_of
from nslora_dist.recipe import Recipe
from nslora_dist.report import spectrum_entry, summary_table, write_report, written_paths
from nslora_dist.run_folder import claim_folder

log = logging.getLogger("nslora_dist")


class Run:
    """One recipe on its way; each stage leaves its result in the run's folder or on the instance."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        """Checks everything that calibration needs and that can be checked without weights; writes nothing.

        Raises:
            UserError: whatever is wrong with the recipe, the model's config or the calibration texts.
        """
        self.recipe, self.device = recipe, device
        self.folder = Path(recipe.output_dir)
        self.clock = Clock()
        with dist.together("finding the base model"):
            self.base_folder = locate(recipe.base_model)
            self.checkpoint = BaseFiles(self.base_folder)
            self.config = load_config(recipe.base_model)
            check_context(self.config, "calibration.sequence_length", recipe.calibration.sequence_length)
        self.groups = self._groups(recipe)
        with self.clock.phase("data"):
            self.tokenizer = load_tokenizer(recipe.base_model, embedded=self.config.vocab_size)
            self.texts = calibration_texts(recipe.calibration, self.tokenizer)
        largest = {text.place: text.largest_token for text in self.texts}
        check_tokens(self.config, recipe.base_model.path, largest)

    def _groups(self, recipe: Recipe) -> list[InputGroup]:
        return target_groups(input_groups(build_empty(recipe.base_model, self.config)), recipe.adapter)

    def _check_room(self, arm: Recipe, *phases: str) -> None:
        """Whether the plan of these phases fits this machine's free disk and memory, before any of them starts."""
        with dist.together("checking for room"):
            shapes = shapes_of(arm, self.config)
            for phase in phases:
                check(
                    arm,
                    phase,
                    world_size=dist.world_size(),
                    device=self.device,
                    ranks_per_node=dist.ranks_per_node(),
                    shapes=shapes,
                )

    def null_space(self) -> NullSpace:
        """The null space of the recipe's own adapter: the one on disk where it fits, else a calibration pass."""
        recipe = self.recipe
        key = self._null_space_key
        folder = self.folder / "null_space"
        found = store.reusable(folder, key["key"])
        if found is not None:
            log.info("null space: %s fits base, data and settings; used again", folder)
            return found
        self._check_room(recipe, "calibrate")
        with self.clock.phase("calibration"):
            empty = build_empty(recipe.base_model, self.config)
            parts = Parts(self.folder / "calibration" / "activations", key["key"])
            calibration = Calibration(
                empty,
                self.checkpoint,
                self.groups,
                section=recipe.calibration,
                adapter=recipe.adapter,
                device=self.device,
                parts=parts,
            )
            made = calibration.run(self.texts)
            null_space = NullSpace(manifest=key | made.manifest, tensors=made.tensors)
            with dist.together("writing the null space"):
                if dist.is_main():
                    store.save(folder, null_space)
            parts.clear()
        return null_space

    def weight_null_space(self, arm: Recipe) -> WeightNullSpace | None:
        """The weights' null spaces for an arm of Null-LoRA, from disk where they fit; None for other methods.

        Raises:
            UserError: no target weight has a null space at the arm's threshold.
        """
        if arm.adapter.method != "null_lora":
            return None
        with self.clock.phase("null spaces of the weights"):
            found = reuse_or_make(
                self.folder,
                self.checkpoint,
                arm,
                self._groups(arm),
                model=lambda: build_empty(arm.base_model, self.config),
                fingerprint=self._fingerprint,
                device=self.device,
            )
        left_out = found.left_out(arm.adapter.rank)
        if left_out:
            log.info("null_lora: no null space at threshold %g, left out: %s", arm.adapter.null_threshold, left_out)
        return found

    @cached_property
    def _fingerprint(self) -> str:
        """The base's, the same on every rank."""
        return str(dist.share(self.checkpoint.fingerprint() if dist.is_main() else None))

    @cached_property
    def _null_space_key(self) -> dict[str, Any]:
        """What the null space depends on, and one hash over it: a run with the same hash reuses it."""
        adapter = self.recipe.adapter
        hashes = {
            "base": self._fingerprint,
            "data": {text.name: {"hash": text.hash, "weight": text.weight} for text in self.texts},
            "settings": artifacts.hash_json(
                {
                    "base": self.recipe.base_model.model_dump(include={"dtype", "quantization"}),
                    "calibration": self.recipe.calibration.model_dump(
                        exclude={"sources", "probes", "hidden_states", "batch_size"}
                    ),
                    "adapter": [adapter.rank, adapter.form, adapter.a_init],
                    "groups": [[shape.name for shape in group.modules] for group in self.groups],
                }
            ),
        }
        return {"kind": "null_space", "key": artifacts.hash_json(hashes), "hashes": hashes}

    def train(self) -> dict[str, Any]:
        """Calibrates, trains the recipe's adapter and its baselines, exports, evaluates and reports.

        Returns:
            The report.
        """
        recipe = self.recipe
        baselines = {name: recipe.arm(name) for name in recipe.evaluation.baselines}
        recipe.engine.check_ranks(dist.world_size())
        recipe.train.accumulation(dist.world_size())
        if not recipe.data.packing:  # a pack may be longer: positions begin anew with each of its samples
            check_context(self.config, "data.max_length", recipe.data.max_length)
        for arm in baselines.values():  # now, and not after hours of training the first arm
            arm.train.accumulation(dist.world_size())
            self._groups(arm)
            _fits(arm, recipe)
        with self.clock.phase("data"):
            data = TrainingData.load(recipe.data, recipe.train, self.tokenizer)
            context = context_of(self.config)
            sets = EvaluationSets.load(recipe.evaluation, self.tokenizer, base=self.base_folder, context=context)
            with dist.together("looking at the data"):  # of evaluation each rank has its own
                largest = {"data": data.largest_token} | sets.largest_tokens
                check_tokens(self.config, recipe.base_model.path, largest)
        for arm in (recipe, *baselines.values()):
            self._check_room(arm, "load", "train", "measure", "export")
        claim_folder(recipe)
        null_space = self.null_space() if recipe.adapter.method == "lora_null" else None
        arms = {recipe.arm_name: recipe, **baselines}
        calibrated = [arm.adapter for arm in arms.values() if arm.adapter.method == "lora_null"]
        if null_space is not None and any(adapter.interference_budget for adapter in calibrated):
            check_references(null_space)
        # Before any training too: a threshold that leaves no null space is the user's to mend.
        weights = {name: found for name, arm in arms.items() if (found := self.weight_null_space(arm)) is not None}
        report: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json"),
            "engine": recipe.engine.name,
            "world_size": dist.world_size(),
            "quantization": recipe.base_model.quantization,
            "evaluation": {},
            "interference_by_arm": {},
            "trained_by": {},
            "leak": None if null_space is None else null_space.leak(),
            "spectra": _spectra(null_space),
            "weight_null_space": {name: found.facts(arms[name].adapter.rank) for name, found in weights.items()},
            "data": {
                "samples": data.samples,
                "tokens": data.tokens,
                "packs": data.packs,
                "truncated": data.truncated,
                "without_response": data.without_response,
            },
            "rows": self._row_counts(data, sets),
        }
        shared = RunContext(
            folder=self.folder,
            device=self.device,
            texts=self.texts,
            sets=sets,
            base=self._fingerprint,
            hashes=self._null_space_key["hashes"],
            clock=self.clock,
            job=lambda arm: self.job(arm.recipe, arm.null_space),
            own=recipe.arm_name,
        )
        for name, arm in arms.items():
            start = weights.get(name, null_space if _fits(arm, recipe) else None)
            arm_data = data if arm.train == recipe.train else data.dealt_by(arm.train)
            figures = run_arm(Arm(name, arm, start, arm_data), shared, report)
            if arm is recipe:
                report |= {key: figures[key] for key in ("losses", "grad_norms", "skipped", "tokens_per_second")}
        report |= {"seconds": self.clock.seconds, **self._memory()}
        with watch.phase("report"), dist.together("writing the report"):
            if dist.is_main():
                write_report(self.folder, report)
        return report

    def _memory(self) -> dict[str, Any]:
        """What the rank that needed most of it held at most, in all and by phase."""
        ranks = dist.gather((self.clock.highest, self.clock.peaks))
        phases = {name: max(peaks.get(name, 0) for _, peaks in ranks) for name in self.clock.peaks}
        return {"peak_memory_bytes": max(highest for highest, _ in ranks), "peak_memory_by_phase": phases}

    def _row_counts(self, data: TrainingData, sets: EvaluationSets) -> dict[str, Any]:
        """What became of the rows of every set that was read, by its place in the recipe."""
        counts = {"data": data.counts}
        counts |= {text.place: text.counts for text in self.texts}
        counts |= {f"evaluation.{name}": found for name, found in sets.counts.items()}
        return {name: found.facts() for name, found in counts.items()}

    def job(self, arm: Recipe, null_space: NullSpace | WeightNullSpace | None) -> Job:
        """The arm's model on the meta device, and how its units are filled."""
        return make_job(arm, self.config, self.checkpoint, self._groups(arm), null_space, device=self.device)


def _fits(arm: Recipe, recipe: Recipe) -> bool:
    """Whether a baseline starts from the null space that was computed for the recipe's own adapter."""
    same = ("rank", "a_init", "form", "target_modules")
    if arm.adapter.method != "lora_null":
        return False
    different = [key for key in same if getattr(arm.adapter, key) != getattr(recipe.adapter, key)]
    if recipe.adapter.method != "lora_null" or different:
        raise UserError(
            "evaluation.baselines: a lora_null baseline shares the recipe's null space, and its "
            f"{different or 'method'} differs; run it as a recipe of its own"
        )
    return True


def _spectra(null_space: NullSpace | None) -> dict[str, Any]:
    if null_space is None or not dist.is_main():
        return {}
    return {
        group: spectrum_entry(null_space.tensors[f"{group}.spectrum"], null_space.manifest["settings"]["rank"])
        | {"modules": entry["modules"]}
        for group, entry in null_space.manifest["groups"].items()
        if f"{group}.spectrum" in null_space.tensors
    }


def run_training(recipe: Recipe, device: torch.device) -> None:
    """``launch/train.py``: the whole way, and the table a person reads at its end."""
    report = Run(recipe, device).train()
    if dist.is_main():
        print(summary_table(report))
        print(written_paths(Path(recipe.output_dir)))


def run_calibration(recipe: Recipe, device: torch.device) -> None:
    """``launch/calibrate.py``: writes ``null_space/``, for Null-LoRA ``weight_null_space/``, and stops.

    Raises:
        UserError: the recipe trains plain LoRA, which starts from no null space: nobody would read one.
    """
    if recipe.adapter.method == "lora":
        raise UserError(
            "adapter.method lora starts from no null space, so there is nothing to calibrate: start launch/train.py, "
            "or set adapter.method=lora_null"
        )
    run = Run(recipe, device)
    claim_folder(recipe)
    if recipe.adapter.method == "null_lora":
        weights = run.weight_null_space(recipe)
        if dist.is_main() and weights is not None:
            print(f"null spaces of the weights: {weights.place(run.folder, weights.manifest['key'])}")
        return
    leak = run.null_space().leak()
    if dist.is_main():
        print(f"null space: {run.folder / 'null_space'}; leak {leak}")
