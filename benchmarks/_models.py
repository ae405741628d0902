"""Synthetic LLaMA-shaped bases and recipes of one size, and alternating timings, for the benchmarks of whole passes."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _common  # noqa: F401  (puts the repository on the path)
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from nslora_dist.batches import Batch

INDEX = "model.safetensors.index.json"


def llama_config(
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    vocabulary: int,
    heads: int | None = None,
    key_values: int | None = None,
) -> LlamaConfig:
    """A LLaMA of the sizes given; heads are 64 wide unless said otherwise."""
    heads = heads or max(1, hidden // 64)
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_values or heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )


def block_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name inside a decoder block → shape of its parameters."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = hidden // config.num_attention_heads
    key_value = head * config.num_key_value_heads
    return {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def write_checkpoint(folder: Path, config: LlamaConfig, dtype: torch.dtype, *, seed: int = 0) -> int:
    """Writes random weights unit by unit, a shard each, with an index and ``config.json``.

    Returns:
        The number of parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        return torch.empty(shape, dtype=dtype).normal_(0, shape[1] ** -0.5, generator=generator)

    outer = (config.vocab_size, config.hidden_size)
    units: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": outer}]
    for number in range(config.num_hidden_layers):
        units.append({f"model.layers.{number}.{name}": shape for name, shape in block_shapes(config).items()})
    units.append({"model.norm.weight": (config.hidden_size,), "lm_head.weight": outer})
    where: dict[str, str] = {}
    count = 0
    for number, unit in enumerate(units):
        file = f"model-{number + 1:05d}-of-{len(units):05d}.safetensors"
        tensors = {name: draw(shape) for name, shape in unit.items()}
        count += sum(t.numel() for t in tensors.values())
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    config.dtype = dtype
    config.save_pretrained(folder)
    return count


def recipe_tree(
    base: Path | str,
    *,
    rank: int,
    dtype: str = "float32",
    quantization: str = "none",
    engine: str = "single",
    method: str = "lora_null",
    batch: int = 1,
    ranks: int = 1,
    solver: str = "fast",
    a_init: str = "projected",
) -> dict[str, Any]:
    """A recipe's values; its texts and rows are named and never read."""
    start = {"a_init": a_init} if method == "lora_null" else {}
    return {
        "name": "benchmark",
        "base_model": {"path": str(base), "dtype": dtype, "quantization": quantization},
        "calibration": {
            "sources": {"text": {"path": "none"}},
            "heldout_fraction": 0.0,
            "batch_size": batch,
            "solver": {"method": solver},
        },
        "adapter": {"method": method, "rank": rank} | start,
        "data": {"path": "none"},
        "train": {
            "learning_rate": 1e-4,
            "max_steps": 1,
            "global_batch_size": batch * ranks,
            "micro_batch_size": batch,
        },
        "engine": {"name": engine},
        "output_dir": "none",
    }


def token_batches(count: int, *, rows: int, length: int, vocabulary: int, seed: int = 0) -> list[Batch]:
    """Full-length rows of random tokens, every one of them supervised."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(3, vocabulary, (rows, length), generator=generator) for _ in range(count)]
    return [Batch(ids, None, None, ids) for ids in drawn]


def alternate(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Times several functions in turn, so that a machine's changing load falls on all of them alike.

    Every one runs once beforehand.

    Returns:
        Name → medians of wall and of processor time (this process, all its threads) in seconds.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            wait()
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            wait()
            if number:
                seconds[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
    return {name: (medians(pairs, 0), medians(pairs, 1)) for name, pairs in seconds.items()}


def medians(pairs: Sequence[tuple[float, ...]], place: int) -> float:
    """The median of one column."""
    return statistics.median(pair[place] for pair in pairs)


def wait() -> None:
    """Waits for a GPU's queue, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def show(figures: Mapping[str, Any]) -> None:
    """Prints one figure a line."""
    for name, value in figures.items():
        print(f"{name:52s} {f'{value:.4g}' if isinstance(value, float) else value}", flush=True)


def random_job(recipe: Any) -> Any:
    """An engine's ``Job`` over the recipe's checkpoint, each A random: its values do not change what it costs."""
    from nslora_dist.attach import attach_adapters
    from nslora_dist.base_config import load_config
    from nslora_dist.base_files import BaseFiles
    from nslora_dist.base_model import build_empty, torch_dtype
    from nslora_dist.base_weights import fill_unit
    from nslora_dist.engines.base import Job, adapter_dtype
    from nslora_dist.input_groups import input_groups, target_groups

    here = torch.device("cpu")
    model = build_empty(recipe.base_model, load_config(recipe.base_model))
    groups = target_groups(input_groups(model), recipe.adapter)
    attach_adapters(model, groups, recipe.adapter, adapter_dtype(recipe, torch_dtype(recipe.base_model)))
    checkpoint = BaseFiles(Path(recipe.base_model.path))
    generator = torch.Generator().manual_seed(0)

    def fill(unit: torch.nn.Module, name: str) -> None:
        fill_unit(unit, name, checkpoint, device=here)
        for module in unit.modules():
            if hasattr(module, "lora_A"):
                a = torch.randn(module.lora_A.shape, generator=generator) / module.lora_A.shape[1] ** 0.5
                module.fill(a, None, device=here)

    return Job(model=model, fill=fill, device=here)
