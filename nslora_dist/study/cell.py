"""One cell, from its start to its line of figures."""

import time
from typing import Any

import torch

from nslora_dist.adapter import Adapter
from nslora_dist.budget import Budget
from nslora_dist.effects import measure, mixture
from nslora_dist.engines import start_engine
from nslora_dist.engines.base import trained as trained_parameters
from nslora_dist.errors import UserError
from nslora_dist.evaluate import evaluate
from nslora_dist.report import Scalars
from nslora_dist.study.bench import EVALUATED_AT_ONCE, Bench
from nslora_dist.study.cells import MEASURED, Cell
from nslora_dist.study.lines import round_floats
from nslora_dist.study.measure import aggregates, few_of, summed_up
from nslora_dist.study.spec import FEW, PIECES
from nslora_dist.trainer import Trained, train

LAST_STEPS = 20


class _Silent(Scalars):
    """Scalars that nobody reads: a study has its curves in the cells' lines."""

    def __init__(self) -> None:
        self._writer = None


def run_cell(bench: Bench, cell: Cell, *, version: str) -> dict[str, Any]:
    """Trains and measures one adapter.

    Args:
        bench: what cells of its base share.
        cell: the cell.
        version: of this code, for the line.

    Returns:
        The line: the cell's settings; ``adaptation``, ``retention`` (the mean over pieces of knowledge) and
        ``retention_by`` piece, the ``base``'s beside them; ``interference`` as ``measure.summed_up``, and its rms on
        the first ``FEW`` sequences a source; the ``budget`` that training was held to, if any; the mean loss of
        the last steps; whether training ``diverged``, which is then measured as it was left; ``seconds`` of this cell
        alone by the clock and of the processor, what cells share not counted.
    """
    recipe, device = bench.recipe(cell), bench.device
    base, texts, sets, data = bench.base_scores(cell), bench.texts(cell), bench.sets(cell), bench.data(cell)
    job = bench.job(cell)
    started, worked = time.perf_counter(), time.process_time()
    engine = start_engine(job, recipe)
    trained, diverged = Trained(), None
    before = time.perf_counter()
    try:
        budget = Budget.of(engine, recipe, texts, device=device)
        trained = train(
            engine, data, recipe.train, device=device, scalars=_Silent(), budget=budget, description=cell.id
        )
    except UserError as error:
        if "not finite" not in str(error):
            raise
        diverged = str(error)
    training = time.perf_counter() - before
    scores = evaluate(engine, sets, device=device)
    at_once: dict[str, Any] = {"batch_size": EVALUATED_AT_ONCE, "device": device}
    effects = measure(engine, texts, **at_once)
    fewer = {
        str(count): aggregates(mixture(measure(engine, few_of(texts, count), with_divergence=False, **at_once)))["rms"]
        for count in FEW
        if count < bench.study.calibrations[cell.calibration].sequences
    }
    arm = bench.study.arms[cell.arm]
    adapters = [module for module in engine.model.modules() if isinstance(module, Adapter)]
    losses = [loss for loss in trained.losses[-LAST_STEPS:] if loss is not None]
    line = {
        "id": cell.id,
        "measured": MEASURED,
        "version": version,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **{key: getattr(cell, key) for key in ("size", "task", "calibration", "arm")},
        **{key: getattr(cell, key) for key in ("learning_rate", "weight_decay", "seed")},
        "method": arm.peer or recipe.adapter.method,
        "rank": recipe.adapter.rank,
        "matched": arm.matched,
        "steps": recipe.train.max_steps,
        "covered": [p for p in PIECES if p in bench.study.calibrations[cell.calibration].covered],
        "sequences": bench.study.calibrations[cell.calibration].sequences,
        "width": bench.config.hidden_size,
        "budget": recipe.adapter.interference_budget,
        "base_hash": bench.base_hash,
        "base_parameters": _counted(engine.model, adapters),
        "trained_parameters": sum(parameter.numel() for parameter in trained_parameters(engine.model)),
        "exported_ranks": sorted({module.exported_rank for module in adapters}),
        "adapted_modules": len(adapters),
        "adaptation": scores["adaptation"],
        "retention": scores["retention"],
        "retention_by": scores["retention_by"],
        "base": base,
        "interference": summed_up(effects) | {"few": fewer},
        "loss": sum(losses) / len(losses) if losses else None,
        "diverged": diverged,
        "training_seconds": training,
        "processor_seconds": time.process_time() - worked,
        "seconds": time.perf_counter() - started,
    }
    engine.close()
    rounded: dict[str, Any] = round_floats(line)
    return rounded


def _counted(model: torch.nn.Module, adapters: list[Adapter]) -> int:
    own = {id(p) for module in adapters for p in module.parameters(recurse=False)}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)
