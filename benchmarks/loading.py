"""Peak host memory of loading a synthetic checkpoint of 1B parameters onto two ranks, in bfloat16 and in 4 bits.

    python benchmarks/loading.py [--json PATH] [--quick] [--engines fsdp2 zero3]

Two processes load the checkpoint (one safetensors shard a unit, with an index) through an engine until it could train,
rank-16 adapters and optimizer included. The parent reads their /proc/PID/status every two milliseconds and takes the
peak of anonymous and shared memory, less what the interpreter held with everything imported. Pages of the mapped
checkpoint are not counted (the kernel drops them when memory is short), and are given apart as `..._resident_...`.

The bound is half of the loaded model plus two decoder blocks, all as loaded: packed in the 4-bit case, adapters
included: float32 under FSDP2; bfloat16 under ZeRO-3, with the float32 masters and gradients of B that it sets up.
`load_peak_over_bound_bf16` and `..._nf4` are the highest over engines and ranks; below 1 no rank ever came near
holding the model whole (`load_peak_over_model_...`: the same over the loaded model).
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import parser, write_result
from _models import block_shapes, llama_config, recipe_tree, show, write_checkpoint
from _ranks import watched_ranks
from torch import nn
from transformers import LlamaConfig

RANK = 16
"""Of the adapters."""


def load(engine: str, folder: str, quantization: str) -> Iterator[Any]:
    """One rank: imports, then loads."""
    import bitsandbytes.functional  # noqa: F401

    from nslora_dist.attach import attach_adapters
    from nslora_dist.base_files import Checkpoint
    from nslora_dist.base_model import (
        build_empty,
        fill_unit,
        input_groups,
        load_config,
        target_groups,
        torch_dtype,
    )
    from nslora_dist.engines import start_engine
    from nslora_dist.engines.base import Job, adapter_dtype
    from nslora_dist.recipe import Recipe

    if engine == "zero3":
        import nslora_dist.engines.zero3
    else:
        import nslora_dist.engines.fsdp2  # noqa: F401
    here = torch.device("cpu")
    tree = recipe_tree(folder, rank=RANK, dtype="bfloat16", quantization=quantization, engine=engine, ranks=2)
    recipe = Recipe.model_validate(tree)
    checkpoint = Checkpoint(Path(folder))
    config = load_config(recipe.base_model)
    model = build_empty(recipe.base_model, config)
    groups = target_groups(input_groups(model), recipe.adapter)
    attach_adapters(model, groups, recipe.adapter, adapter_dtype(recipe, torch_dtype(recipe.base_model)))
    _warm_up()
    yield

    def fill(unit: nn.Module, name: str) -> None:
        fill_unit(unit, name, checkpoint, device=here)
        for module in unit.modules():
            if hasattr(module, "lora_A"):
                module.fill(torch.randn(module.lora_A.shape), None, device=here)

    start = time.perf_counter()
    started = start_engine(Job(model=model, fill=fill, device=here), recipe)
    yield time.perf_counter() - start
    del started


def _warm_up() -> None:
    """First calls load code and start threads, which is the interpreter's own."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    bnb.dequantize_4bit(packed, state)
    torch.distributed.all_reduce(torch.ones(4))


def loaded_bytes(config: LlamaConfig, quantization: str, engine: str) -> tuple[int, int]:
    """(whole model, one block) as loaded: bfloat16, or the blocks' linears in NF4 with twice-quantised statistics."""

    def size(shape: tuple[int, ...]) -> float:
        numbers = float(torch.Size(shape).numel())
        if len(shape) == 1:
            return 2 * numbers
        adapter = RANK * (4 * sum(shape) if engine == "fsdp2" else 2 * sum(shape) + 8 * shape[0])
        # Packed: half a byte a value, a byte a block of 64 for its largest, and a float32 for every 256 of those.
        return adapter + (
            2 * numbers if quantization == "none" else numbers / 2 + numbers / 64 + 4 * numbers / 64 / 256
        )

    block = sum(size(shape) for shape in block_shapes(config).values())
    outer = 2 * (2 * config.vocab_size + 1) * config.hidden_size
    return int(config.num_hidden_layers * block + outer), int(block)


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--quick", action="store_true", help="a small checkpoint, to see that it runs")
    cli.add_argument("--hidden", type=int, default=2048)
    cli.add_argument("--intermediate", type=int, default=5632)
    cli.add_argument("--layers", type=int, default=19)
    cli.add_argument("--vocabulary", type=int, default=16000)
    cli.add_argument("--engines", nargs="+", choices=["fsdp2", "zero3"], default=["fsdp2", "zero3"])
    cli.add_argument("--cases", nargs="+", choices=["bf16", "nf4"], default=["bf16", "nf4"])
    args = cli.parse_args()
    if args.quick:
        args.hidden, args.intermediate, args.layers, args.vocabulary = 128, 256, 2, 256
    config = llama_config(
        hidden=args.hidden, intermediate=args.intermediate, layers=args.layers, vocabulary=args.vocabulary
    )
    preload = ("nslora_dist.engines.zero3",) if "zero3" in args.engines else ()
    figures: dict[str, Any] = {}
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    with tempfile.TemporaryDirectory(prefix="loading-") as name:
        figures["parameters"] = write_checkpoint(Path(name), config, torch.bfloat16)
        for case in args.cases:
            quantization = "nf4" if case == "nf4" else "none"
            new: dict[str, Any] = {}
            for engine in args.engines:
                model, block = loaded_bytes(config, quantization, engine)
                bound = model // 2 + 2 * block
                ranks = watched_ranks(load, 2, engine, name, quantization, threads=args.threads or 1, preload=preload)
                peak = max(rank.added for rank in ranks)
                new |= {
                    f"bytes_model_{case}_{engine}": model,
                    f"bytes_block_{case}_{engine}": block,
                    f"bytes_load_bound_{case}_{engine}": bound,
                    f"bytes_load_peak_{case}_{engine}": peak,
                    f"bytes_load_peak_resident_{case}_{engine}": max(
                        rank.peak_resident - rank.own_resident for rank in ranks
                    ),
                    f"bytes_interpreter_{case}_{engine}": max(rank.own for rank in ranks),
                    f"seconds_load_{case}_{engine}": round(max(rank.result for rank in ranks), 2),
                    f"load_peak_over_bound_{case}_{engine}": round(peak / bound, 3),
                    f"load_peak_over_model_{case}_{engine}": round(peak / model, 3),
                }
            for figure in ("load_peak_over_bound", "load_peak_over_model"):
                new[f"{figure}_{case}"] = max(new[f"{figure}_{case}_{engine}"] for engine in args.engines)
            show(new)
            figures |= new
            write_result(args.json, figures, settings)


if __name__ == "__main__":
    main()
