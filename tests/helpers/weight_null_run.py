"""The weights' null spaces on a group of ranks, and what a second run in the same folder does."""

from pathlib import Path
from typing import Any

from helpers.stages import CPU
from helpers.world import make_recipe
from nslora_dist import arm_stage, dist
from nslora_dist.calibration import weights
from nslora_dist.errors import UserError
from nslora_dist.pipeline import Run

NULL_LORA: dict[str, Any] = {"method": "null_lora", "null_dim": 16, "null_threshold": 0.3}


def recipe(world: Path, base: str, folder: str, *, placement: str = "rank0", **adapter: Any) -> Any:
    """A Null-LoRA recipe of the toy world."""
    changes = {"adapter": NULL_LORA | adapter, "calibration": {"solver": {"placement": placement}}}
    return make_recipe(world, world / base, world / folder, **changes)


def spread(world: Path, base: str) -> dict[str, Any]:
    """What both placements found: manifest and tensors (on rank 0), how many modules this rank solved, and bases."""
    found: dict[str, Any] = {}
    for placement in ("rank0", "spread"):
        solved: list[str] = []
        kept = weights._solve

        def counted(shape: Any, *args: Any, solved: list[str] = solved, kept: Any = kept, **more: Any) -> Any:
            solved.append(shape.name)
            return kept(shape, *args, **more)

        weights._solve = counted
        job = recipe(world, base, f"{base}_{placement}_{dist.world_size()}", placement=placement)
        space = Run(job, CPU).weight_null_space(job)
        weights._solve = kept
        assert space is not None
        sent = {name: space.bases(name, device=CPU) for name, sizes in space.sizes(8).items() if sizes.rank}
        found[placement] = (dict(space.manifest["modules"]), dict(space.tensors), solved, sent)
    return found


def used_again(world: Path) -> dict[str, str]:
    """What later runs in a folder did."""
    first = recipe(world, "llama", "again")
    space = Run(first, CPU).weight_null_space(first)
    assert space is not None
    file = space.place(world / "again", space.manifest["key"]) / space.FILE
    kept = weights.weight_null_space
    said = {}

    class Decomposes(Exception):
        pass

    def decompose(*args: Any, **more: Any) -> None:
        raise Decomposes

    weights.weight_null_space = decompose

    def attempt(**adapter: Any) -> str:
        job = recipe(world, "llama", "again", placement="spread", **adapter)
        try:
            again = Run(job, CPU).weight_null_space(job)
        except Decomposes:
            return "decomposes"
        except UserError as error:
            # In a group, a rank that owned nothing hears of it from the one that did.
            return "decomposes" if "decomposing the weights" in str(error) else f"refuses: {error}"
        assert again is not None and again.manifest["modules"] == space.manifest["modules"]
        return "uses it again"

    said["same"] = attempt()
    said["a smaller rank"] = attempt(rank=4)
    said["another threshold"] = attempt(null_threshold=0.31)
    said["another dim"] = attempt(null_dim=15)
    said["fewer targets"] = attempt(target_modules=["q_proj"])
    dist.barrier()
    if dist.is_main():
        data = bytearray(file.read_bytes())
        data[-5] ^= 0x40
        file.write_bytes(data)
    dist.barrier()
    said["damaged"] = attempt()
    weights.weight_null_space = kept
    return said


class Started(Exception):
    """A run came as far as its first engine."""


def refused(world: Path, base: str, threshold: float) -> str:
    """The message that ended a whole run before anything was trained."""
    job = recipe(world, base, f"refused_{base}_{threshold}", null_threshold=threshold)
    if dist.world_size() > 1:
        job = job.model_copy(update={"engine": job.engine.model_copy(update={"name": "fsdp2"})})
    kept = arm_stage.start_engine

    def start(*args: Any) -> Any:
        raise Started

    arm_stage.start_engine = start
    try:
        Run(job, CPU).train()
    except UserError as error:
        return str(error)
    except Started:
        return "an engine was started"
    finally:
        arm_stage.start_engine = kept
    return "no error"
