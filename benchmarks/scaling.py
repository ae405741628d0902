"""Calibration and training step against the number of ranks and of blocks: time and peak host memory.

    python benchmarks/scaling.py [--json PATH] [--quick] [--engine fsdp2]

The same tokens and the same global batch, dealt over 1, 2 and 4 processes of one machine, for three depths. Memory is
the peak of a rank's anonymous and shared memory less what the interpreter held, read from outside (see `_ranks.py`);
the step's covers loading the sharded model and the steps, the calibration's the whole pass with its solver
(`..._resident_...` counts pages of the mapped checkpoint as well).

`calibration_memory_depth_ratio` is the deepest model's peak over the shallowest one's, resident pages included, the
highest over the numbers of ranks: about 1, whatever the depth. Processes beyond the machine's cores share them, so
that their times tell of overhead and not of speed.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import parser, write_result
from _models import llama_config, medians, random_job, recipe_tree, show, token_batches, write_checkpoint
from _ranks import Watched, watched_ranks

HERE = torch.device("cpu")


def calibrate(folder: str, settings: dict[str, Any]) -> Iterator[Any]:
    """One rank's calibration from the checkpoint folder."""
    from nslora_dist.base_config import load_config
    from nslora_dist.base_files import BaseFiles
    from nslora_dist.base_model import build_empty
    from nslora_dist.calibration.run import Calibration
    from nslora_dist.calibration_data import CalibrationTexts
    from nslora_dist.input_groups import input_groups, target_groups
    from nslora_dist.recipe import Recipe

    recipe = Recipe.model_validate(recipe_tree(folder, rank=16, batch=1))
    config = load_config(recipe.base_model)
    rows = token_batches(settings["sequences"], rows=1, length=settings["length"], vocabulary=settings["vocabulary"])
    texts = [CalibrationTexts("text", 1.0, [batch.input_ids[0] for batch in rows], [], "", 0)]
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))  # loads code, as does the product
    torch.mm(torch.ones(256, 256), torch.ones(256, 256))
    yield
    start = time.perf_counter()
    model = build_empty(recipe.base_model, config)
    groups = target_groups(input_groups(model), recipe.adapter)
    checkpoint = BaseFiles(Path(folder))
    calibration = Calibration(
        model, checkpoint, groups, section=recipe.calibration, adapter=recipe.adapter, device=HERE
    )
    calibration.run(texts)
    yield time.perf_counter() - start


def train(folder: str, settings: dict[str, Any], engine: str, world_size: int) -> Iterator[Any]:
    """One rank's sharded load and a few steps; gives the median step."""
    from nslora_dist.engines import start_engine
    from nslora_dist.recipe import Recipe

    rows = settings["rows"] // world_size
    recipe = Recipe.model_validate(recipe_tree(folder, rank=16, engine=engine, batch=rows, ranks=world_size))
    batch = token_batches(1, rows=rows, length=settings["length"], vocabulary=settings["vocabulary"])[0]
    torch.mm(torch.ones(256, 256), torch.ones(256, 256))
    yield
    started = start_engine(random_job(recipe), recipe)
    seconds: list[tuple[float, ...]] = []
    for number in range(settings["steps"] + 1):
        start = time.perf_counter()
        started.backward(started.forward(batch) / batch.supervised_tokens)
        started.step(1e-4)
        if number:
            seconds.append((time.perf_counter() - start,))
    yield medians(seconds, 0)


def summary(ranks: list[Watched]) -> tuple[float, int, int]:
    """(slowest rank's seconds, highest peak added, the same with mapped pages) in seconds and bytes."""
    resident = max(rank.peak_resident - rank.own_resident for rank in ranks)
    return max(rank.result for rank in ranks), max(rank.added for rank in ranks), resident


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--quick", action="store_true", help="a toy size, two depths")
    cli.add_argument("--hidden", type=int, default=512)
    cli.add_argument("--intermediate", type=int, default=1408)
    cli.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8])
    cli.add_argument("--ranks", type=int, nargs="+", help="(default: 1 2 4; 1 2 with --quick)")
    cli.add_argument("--vocabulary", type=int, default=2048)
    cli.add_argument("--sequences", type=int, default=16, help="calibrated on, over all ranks")
    cli.add_argument("--length", type=int, default=256)
    cli.add_argument("--rows", type=int, default=4, help="of a training step, over all ranks")
    cli.add_argument("--steps", type=int, default=5)
    cli.add_argument("--engine", choices=["fsdp2", "zero3"], default="fsdp2")
    args = cli.parse_args()
    if args.quick:
        args.hidden, args.intermediate, args.vocabulary, args.sequences, args.length = 128, 256, 128, 4, 32
        args.depths, args.steps = [1, 2], 1
    args.ranks = args.ranks or ([1, 2] if args.quick else [1, 2, 4])
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    figures: dict[str, Any] = {}
    for depth in args.depths:
        config = llama_config(
            hidden=args.hidden, intermediate=args.intermediate, layers=depth, vocabulary=args.vocabulary
        )
        with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
            write_checkpoint(Path(folder), config, torch.float32)
            for count in args.ranks:
                key = f"{count}ranks_{depth}blocks"
                new: dict[str, Any] = {}
                found = summary(watched_ranks(calibrate, count, folder, settings, threads=args.threads or 1))
                new[f"seconds_calibration_{key}"] = round(found[0], 3)
                new[f"bytes_calibration_{key}"], new[f"bytes_calibration_resident_{key}"] = found[1:]
                found = summary(
                    watched_ranks(train, count, folder, settings, args.engine, count, threads=args.threads or 1)
                )
                new[f"seconds_step_{key}"] = round(found[0], 4)
                new[f"bytes_step_{key}"], new[f"bytes_step_resident_{key}"] = found[1:]
                show(new)
                figures |= new
                write_result(args.json, figures, settings)

    def over_depths(measure: str, count: int) -> float:
        deepest, shallowest = (f"{count}ranks_{choose(args.depths)}blocks" for choose in (max, min))
        return round(figures[f"{measure}_{deepest}"] / figures[f"{measure}_{shallowest}"], 3)

    last = {
        "calibration_memory_depth_ratio": max(over_depths("bytes_calibration_resident", n) for n in args.ranks),
        "calibration_memory_depth_ratio_anonymous": max(over_depths("bytes_calibration", n) for n in args.ranks),
        "calibration_time_depth_ratio": max(over_depths("seconds_calibration", n) for n in args.ranks),
        "step_time_depth_ratio": max(over_depths("seconds_step", n) for n in args.ranks),
    }
    show(last)
    write_result(args.json, figures | last, settings)


if __name__ == "__main__":
    main()
