"""Streamed calibration against a plain forward pass of the same tokens through the same model.

    python benchmarks/calibration.py [--json PATH] [--quick] [--threads 1]

Timed in turn, in one run, on a synthetic LLaMA-shaped checkpoint:

- forward: the transformers model as it comes, weights in memory, no head, under no_grad;
- grams: every block read from disk, all sequences through it, all Grams and output energies summed, block released;
- solved: the whole calibration, null bases and projected starts included (rank 16, the fast solver).

`calibration_over_forward` (grams / forward) and `calibration_with_solve_over_forward` are of wall time in float32, and
`..._bfloat16` in bfloat16; `..._cpu` are the same of processor time, from which waiting for other work on the machine
is left out (use --threads 1 there). A solve costs d³ whatever the number of tokens, so its share falls with them:
the recipes calibrate on 524,288 tokens, this on a few thousand.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import parser, write_result
from _models import alternate, llama_config, recipe_tree, show, token_batches, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from nslora_dist.base_files import BaseFiles
from nslora_dist.base_model import build_empty
from nslora_dist.batches import Batch
from nslora_dist.calibration.grams import Collector, GroupSums
from nslora_dist.calibration.run import Calibration
from nslora_dist.calibration.stream import BlockStream, Texts
from nslora_dist.calibration_data import CalibrationTexts
from nslora_dist.input_groups import input_groups, target_groups
from nslora_dist.recipe import Recipe

HERE = torch.device("cpu")


def forward(model: Any, batches: list[Batch]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch.input_ids, use_cache=False)


def grams(recipe: Recipe, config: LlamaConfig, batches: list[Batch]) -> dict[str, Tensor]:
    """Grams alone: what ``Calibration`` does for one source up to the solver."""
    model = build_empty(recipe.base_model, config)
    groups = target_groups(input_groups(model), recipe.adapter)
    stream = BlockStream(model, BaseFiles(Path(recipe.base_model.path)), device=HERE, place="device")
    texts = Texts("text", batches, device=HERE, keep=HERE)
    stream.embed([texts])
    found = {}
    for number, (name, _) in enumerate(stream.blocks):
        stream.load(number)
        mine = [group for group in groups if group.name.startswith(f"{name}.")]
        sums = {group.name: GroupSums(group, basis=None, device=HERE) for group in mine}
        stream.run(number, texts, Collector(mine, sums))
        for total in sums.values():
            total.finish()
        found = {key: total.energy for key, total in sums.items()}  # the Grams go, as they do once solved
        stream.release(number)
    return found


def solved(recipe: Recipe, config: LlamaConfig, batches: list[Batch]) -> None:
    model = build_empty(recipe.base_model, config)
    groups = target_groups(input_groups(model), recipe.adapter)
    calibration = Calibration(
        model,
        BaseFiles(Path(recipe.base_model.path)),
        groups,
        section=recipe.calibration,
        adapter=recipe.adapter,
        device=HERE,
    )
    rows = [row for batch in batches for row in batch.input_ids]
    calibration.run([CalibrationTexts("text", 1.0, rows, [], "", 0)])


def measure(dtype: str, config: LlamaConfig, args: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="calibration-") as name:
        folder = Path(name)
        write_checkpoint(folder, config, getattr(torch, dtype))
        recipe = Recipe.model_validate(recipe_tree(folder, rank=16, dtype=dtype, batch=args.batch))
        count = max(1, args.tokens // (args.batch * args.length))
        batches = token_batches(count, rows=args.batch, length=args.length, vocabulary=config.vocab_size)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).model.eval()
        runs: dict[str, Any] = {
            "forward": partial(forward, model, batches),
            "grams": partial(grams, recipe, config, batches),
        }
        if not args.no_solve:
            runs["solved"] = partial(solved, recipe, config, batches)
        times = alternate(runs, args.repeats)
    end = "" if dtype == "float32" else f"_{dtype}"
    figures: dict[str, Any] = {}
    for key, (wall, _) in times.items():
        figures[f"seconds_{key}_{dtype}"] = round(wall, 4)
    figures[f"tokens_per_second_grams_{dtype}"] = round(count * args.batch * args.length / times["grams"][0], 1)
    for run, figure in (("grams", "calibration_over_forward"), ("solved", "calibration_with_solve_over_forward")):
        if run in times:
            figures[f"{figure}{end}"] = round(times[run][0] / times["forward"][0], 3)
            figures[f"{figure}{end}_cpu"] = round(times[run][1] / times["forward"][1], 3)
    return figures


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--quick", action="store_true", help="a toy size, to see that it runs")
    cli.add_argument("--hidden", type=int, default=1024)
    cli.add_argument("--intermediate", type=int, default=2816)
    cli.add_argument("--layers", type=int, default=3)
    cli.add_argument("--tokens", type=int, default=8192)
    cli.add_argument("--length", type=int, default=1024, help="of a sequence")
    cli.add_argument("--batch", type=int, default=2, help="sequences a batch")
    cli.add_argument("--repeats", type=int, default=5)
    cli.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    cli.add_argument("--no-solve", action="store_true")
    args = cli.parse_args()
    if args.quick:
        args.hidden, args.intermediate, args.layers, args.tokens, args.length = 128, 256, 2, 256, 64
        args.repeats = 1
    if args.threads:
        torch.set_num_threads(args.threads)
    config = llama_config(hidden=args.hidden, intermediate=args.intermediate, layers=args.layers, vocabulary=1024)
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    figures: dict[str, Any] = {}
    for dtype in args.dtypes:
        new = measure(dtype, config, args)
        show(new)
        figures |= new
        write_result(args.json, figures, settings)


if __name__ == "__main__":
    main()
