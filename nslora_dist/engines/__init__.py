"""Who shards parameters, gradients and optimizer state: ``single``, ``fsdp2`` and ``zero3`` behind one Protocol."""

from nslora_dist.engines.base import Engine, Job
from nslora_dist.recipe import Recipe


def start_engine(job: Job, recipe: Recipe) -> Engine:
    """Loads the job's model unit by unit, shards it, and sets up its optimizer with the recipe's engine.

    Raises:
        UserError: the engine cannot run so many ranks, or is not installed.
    """
    match recipe.engine.name:
        case "single":
            from nslora_dist.engines.single import SingleEngine

            return SingleEngine(job, recipe)
        case "fsdp2":
            from nslora_dist.engines.fsdp2 import Fsdp2Engine

            return Fsdp2Engine(job, recipe)
        case "zero3":
            from nslora_dist.engines.zero3 import Zero3Engine

            return Zero3Engine(job, recipe)
