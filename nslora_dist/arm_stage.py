"""One arm from its start to its adapter on disk; each stage that an earlier process finished is taken up, not redone.

finished arm (figures + adapter) → base scores → checkpoint in training → checkpoint at its end → export
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nslora_dist import artifacts, dist
from nslora_dist.arm_job import Arm
from nslora_dist.arms import BaseScores, FinishedArm, evaluation_hash
from nslora_dist.budget import Budget
from nslora_dist.calibration_data import CalibrationTexts
from nslora_dist.checkpoint import Checkpoints, identity
from nslora_dist.clock import Clock
from nslora_dist.effects import divergence, final_interference, measure, summarise
from nslora_dist.engines import Engine, start_engine
from nslora_dist.engines.base import Job
from nslora_dist.evaluate import EvaluationSets, evaluate
from nslora_dist.export_arm import export
from nslora_dist.manifests import listed_files
from nslora_dist.report import Scalars
from nslora_dist.trainer import train


@dataclass(frozen=True)
class RunContext:
    """What all arms of a run share.

    Attributes:
        folder: the run's.
        device: this rank's.
        texts: the calibration's.
        sets: what arms are evaluated on.
        base: the base's fingerprint.
        hashes: of base, calibration texts and evaluation rows.
        clock: times the phases.
        job: an arm's empty model and how it is filled.
        own: the name of the recipe's own arm; the others are baselines.
    """

    folder: Path
    device: torch.device
    texts: list[CalibrationTexts]
    sets: EvaluationSets
    base: str
    hashes: dict[str, Any]
    clock: Clock
    job: Callable[[Arm], Job]
    own: str

    def adapter(self, name: str) -> Path:
        """An arm's adapter folder."""
        return self.folder / ("adapter" if name == self.own else f"baselines/{name}")

    def checkpoints(self, name: str) -> Path:
        """Where an arm's training state is kept."""
        return self.folder / "checkpoints" / ("" if name == self.own else f"baselines/{name}")


def run_arm(arm: Arm, run: RunContext, report: dict[str, Any]) -> dict[str, Any]:
    """Trains one adapter, measures it and writes it, or takes up what an earlier run of the same left.

    Returns:
        The arm's figures, which are in the report as well.

    Raises:
        Preempted: a rank was asked to stop, and the state is on disk.
    """
    hashes = run.hashes | {"rows": arm.data.hash, "evaluation": evaluation_hash(run.sets)}
    folder = run.adapter(arm.name)
    finished = FinishedArm(run.folder, arm.name, folder, arm=arm.recipe, hashes=hashes)
    figures = finished.read()
    engine = None
    if figures is None:
        engine, figures = _train(arm, run, report, hashes, finished)
    report["evaluation"].setdefault("base", figures["base"])
    report["evaluation"][arm.name] = figures["scores"]
    report["interference_by_arm"][arm.name] = figures["interference"]
    report["trained_by"][arm.name] = figures["trained_by"]
    if arm.name == run.own:
        report |= {"interference": figures["interference"], "adapter": str(folder)}
    if engine is not None:
        with run.clock.phase("export", arm.name):
            export(engine, arm, folder, report, texts=run.texts, base=run.base, device=run.device)
            engine.close()
            finished.write(figures | {"seconds": run.clock.seconds})
    else:
        # The phases that were skipped took their time in the run that did them.
        run.clock.seconds = figures["seconds"] | {k: v for k, v in run.clock.seconds.items() if k == "data"}
    return figures


def _train(
    arm: Arm, run: RunContext, report: dict[str, Any], hashes: dict[str, Any], finished: FinishedArm
) -> tuple[Engine, dict[str, Any]]:
    """Loads, trains and measures; the adapter is still in the engine."""
    section, clock, device = arm.recipe.train, run.clock, run.device
    made_of = {"base": run.base, "rows": arm.data.hash, "null_space": start_hash(arm, run.folder)}
    if arm.recipe.adapter.measures_a:
        made_of["texts"] = artifacts.hash_json([run.hashes["data"], run.hashes["settings"]])
    belongs_to = identity(arm.recipe, made_of)
    checkpoints = Checkpoints(
        run.checkpoints(arm.name), arm.recipe.checkpoint, belongs_to=belongs_to, engine=arm.recipe.engine.name
    )
    with clock.phase("load", arm.name):
        checkpoints.look()
        engine = start_engine(run.job(arm), arm.recipe)
    kept = BaseScores(run.folder, arm=arm.recipe, base=run.base, evaluation=hashes["evaluation"])
    base = report["evaluation"].get("base") or kept.read()
    if base is None:
        # Every adapter starts as the base's own function, the residual form but for the rounding of two products that
        # cancel, so the first arm's engine stands for the base.
        with clock.phase("evaluation", "the base"):
            base = evaluate(engine, run.sets.before_training(), device=device)
            kept.write(base)
    tensorboard = run.folder / "tensorboard" / arm.name
    with clock.phase("training", arm.name), Scalars(tensorboard, start=checkpoints.step) as scalars:
        budget = Budget.of(engine, arm.recipe, run.texts, device=device)
        trained = train(
            engine,
            arm.data,
            section,
            device=device,
            scalars=scalars,
            checkpoints=checkpoints,
            budget=budget,
            description=f"training {arm.name}",
        )
    state = checkpoints.folder / f"step-{checkpoints.last}"
    measured = finished.read_measured(state)
    if measured is None:
        with clock.phase("evaluation", arm.name):
            scores = evaluate(engine, run.sets, device=device) | {"learning_rate": section.learning_rate}
            size = arm.recipe.calibration.batch_size
            effects = measure(engine, run.texts, batch_size=size, device=device)
            found = final_interference(engine, arm.data, effects, device=device)
            interference = summarise(found, run.texts, divergence(effects))
            if budget is not None:
                interference["budget"] = budget.facts()
        measured = {"scores": scores, "interference": interference, "seconds": clock.seconds["evaluation"]}
        finished.write_measured(state, measured)
    else:
        clock.seconds["evaluation"] = measured["seconds"]  # it took its time in the process that did it
    clock.seconds["training"] += checkpoints.earlier_seconds
    return engine, {
        "base": base,
        "scores": measured["scores"],
        "interference": measured["interference"],
        "losses": trained.losses,
        "grad_norms": trained.grad_norms,
        "skipped": trained.skipped,
        "tokens_per_second": trained.tokens_per_second,
        "trained_by": checkpoints.history,
    }


def start_hash(arm: Arm, run: Path) -> str | None:
    """The hash of the very null space that an arm starts from; None where it draws a random A from its seed.

    The key of a null space says what it was made from, and made again, by other ranks say, it is not the same to the
    last bit, nor is a basis within nearly equal eigenvalues. B means nothing behind another A.
    """
    if arm.null_space is None:
        return None
    found: str | None = None
    with dist.together("reading the null space"):
        if dist.is_main():
            found = listed_files(arm.null_space.place(run, arm.null_space.manifest["key"]))
    return str(dist.share(found))
