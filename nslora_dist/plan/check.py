"""Before a phase starts: is there room for it on this machine, now?"""

import math
import shutil
from pathlib import Path

import torch

from nslora_dist import machine
from nslora_dist.errors import UserError
from nslora_dist.plan.cluster import Cluster
from nslora_dist.plan.phase import gb
from nslora_dist.plan.phases import make_plan
from nslora_dist.plan.shapes import Shapes, shapes_of
from nslora_dist.recipe import Recipe

UNSURE = 1.1
"""A plan of memory is within a tenth of what runs measure, so a phase is refused only where it is short by more."""


def check(
    recipe: Recipe,
    phase: str,
    *,
    world_size: int,
    device: torch.device,
    ranks_per_node: int | None = None,
    shapes: Shapes | None = None,
) -> None:
    """Compares a phase's plan with the free disk, GPU and host memory of this machine; no collective in it.

    Args:
        recipe: the job.
        phase: ``load``, ``calibrate``, ``train``, ``measure`` or ``export``.
        world_size: number of ranks.
        device: this rank's; on the CPU what a GPU would hold counts as host memory.
        ranks_per_node: ranks on this machine; all of them where left out.
        shapes: the model's, read off the config where left out.

    Raises:
        UserError: too little, in one line with both figures.
    """
    local = world_size if ranks_per_node is None else ranks_per_node
    shapes = shapes_of(recipe) if shapes is None else shapes
    cluster = Cluster(gpus=world_size, gpus_per_node=local, interpreter=0.0)
    # No batch has to divide over these ranks, nor an engine shard: nothing may be trained on them.
    if phase in ("load", "calibrate"):
        engine = recipe.engine.model_copy(update={"name": "fsdp2"}) if recipe.engine.name == "single" else recipe.engine
        recipe = recipe.model_copy(update={"train": recipe.train.fitting(world_size), "engine": engine})
    wanted = make_plan(recipe, shapes, cluster).phase(phase)
    folder = Path(recipe.output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free + _held(folder / "checkpoints")
    if wanted.disk > free:
        raise UserError(
            f"{phase}: needs {gb(wanted.disk)} of disk in output_dir {recipe.output_dir}, {gb(free)} are free; "
            "make room, or give another output_dir"
        )
    gpu, host = wanted.gpu_bytes, wanted.host_bytes
    ask = f"python launch/plan.py --recipe {recipe.name} --gpus {cluster.gpus} (and your overrides)"
    if device.type == "cuda":
        left, held, whole = machine.gpu_memory(device)  # what this run holds the plan counts, too
        if gpu > UNSURE * (left + held):
            raise UserError(
                f"{phase}: needs about {gb(gpu)} of GPU memory, {gb(left + held)} of {gb(whole)} can be had; "
                f"{ask} says what to change"
            )
    else:
        host += gpu * local
    found = machine.host_memory()
    available = math.inf if found is None else found[0] + local * found[1]
    if host > UNSURE * available:
        raise UserError(
            f"{phase}: needs about {gb(host)} of host memory, {gb(available)} are free; {ask} says what to change"
        )


def _held(folder: Path) -> int:
    """Bytes of the checkpoints that are there already: the plan counts them, and older ones make room for newer."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
