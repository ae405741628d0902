"""One training step against PEFT's LoRA of the same rank and targets, and against the frozen model without adapter.

    python benchmarks/train_step.py [--json PATH] [--quick] [--threads 1] [--cases float32 bfloat16 nf4]

Same synthetic weights, attention (sdpa), tokens, loss (the project's head and chunked cross-entropy for all three),
AdamW, gradient clipping; no checkpointing, no dropout, every one of the seven linears of a block adapted:

- ours: the project's single engine, delta form, A frozen, B from zero;
- peft: transformers' model with `get_peft_model`, A and B trained, its default float32 adapter parameters;
- free: the same frozen base without adapters, the embedding's output taking a gradient: forward and input gradients.

Figures per case (float32 is the one without a suffix): `tokens_per_second_over_peft_r<rank>` (above 1: ours is
faster), `step_over_adapter_free_r<rank>`, `saved_memory_over_peft_r<rank>`: bytes that autograd keeps between forward
and backward, unique storages, parameters and buffers left out. `..._cpu` are the same ratios of processor time, from
which waiting for other work on the machine is left out (with --threads 1). The 4-bit case compares with PEFT on
bitsandbytes' own linears.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import parser, write_result
from _models import alternate, llama_config, random_job, recipe_tree, show, token_batches, write_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from nslora_dist.base_files import BaseFiles
from nslora_dist.base_model import build_empty, torch_dtype, units
from nslora_dist.base_weights import fill_unit, finish
from nslora_dist.batches import Batch
from nslora_dist.engines.single import SingleEngine
from nslora_dist.frozen import FrozenHead
from nslora_dist.recipe import Recipe
from nslora_dist.recipe_adapter import LINEAR_TARGETS
from nslora_dist.supervised import SupervisedModel

HERE = torch.device("cpu")


def our_step(engine: SingleEngine, batch: Batch) -> float:
    loss = engine.forward(batch)
    engine.backward(loss / batch.supervised_tokens)
    return engine.step(1e-4)


class Peft:
    """PEFT's LoRA at its best fair setting, under the project's loss."""

    def __init__(self, recipe: Recipe) -> None:
        from peft import LoraConfig, get_peft_model

        base = AutoModelForCausalLM.from_pretrained(recipe.base_model.path, dtype=torch_dtype(recipe.base_model))
        if recipe.base_model.quantization == "nf4":
            quantise(base, torch_dtype(recipe.base_model))
        base.config.use_cache = False
        rank = recipe.adapter.rank
        settings = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(LINEAR_TARGETS))
        model = get_peft_model(base, settings).base_model.model
        model.lm_head = FrozenHead(model.lm_head.weight)
        self.root = SupervisedModel(model).train()
        self.trained = [parameter for parameter in self.root.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0)

    def step(self, batch: Batch) -> float:
        (self.root(batch) / batch.supervised_tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)


def quantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts bitsandbytes' 4-bit linears in the place of the blocks' dense ones, as transformers does on loading."""
    import bitsandbytes as bnb

    for name, linear in [(n, m) for n, m in model.model.named_modules() if isinstance(m, nn.Linear)]:
        packed = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
        )
        packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        model.model.set_submodule(name, packed.to("cpu"))


class AdapterFree:
    """The frozen base alone: forward and the gradient with respect to the embedding's output."""

    def __init__(self, recipe: Recipe, config: LlamaConfig) -> None:
        model = build_empty(recipe.base_model, config)
        checkpoint = BaseFiles(Path(recipe.base_model.path))
        for name, unit in units(model):
            fill_unit(unit, name, checkpoint, device=HERE)
        finish(model, device=HERE)
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.requires_grad_())
        self.root = SupervisedModel(model).train()

    def step(self, batch: Batch) -> None:
        (self.root(batch) / batch.supervised_tokens).backward()


def saved_bytes(root: nn.Module, batch: Batch) -> int:
    """Bytes that autograd keeps for backward after a forward pass: unique storages that are no parameter's."""
    own = {p.untyped_storage().data_ptr() for p in (*root.parameters(), *root.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The tensors stay alive with the graph, so that no address is used twice.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = root(batch)
    del loss
    return sum(found.values())


def measure(case: str, config: LlamaConfig, args: Any) -> dict[str, Any]:
    dtype = "bfloat16" if case == "bfloat16" else "float32"
    quantization = "nf4" if case == "nf4" else "none"
    end = "" if case == "float32" else f"_{case}"
    batch = token_batches(1, rows=args.batch, length=args.length, vocabulary=config.vocab_size)[0]
    tokens = batch.token_count
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="train-step-") as name:
        folder = Path(name)
        write_checkpoint(folder, config, getattr(torch, dtype))
        for rank in args.ranks:
            tree = recipe_tree(folder, rank=rank, dtype=dtype, quantization=quantization, batch=args.batch)
            recipe = Recipe.model_validate(tree)
            engine, peft, free = SingleEngine(random_job(recipe), recipe), Peft(recipe), AdapterFree(recipe, config)
            runs = {"ours": partial(our_step, engine, batch), "peft": partial(peft.step, batch)}
            times = alternate(runs | {"free": partial(free.step, batch)}, args.repeats)
            saved = {"ours": saved_bytes(engine.root, batch), "peft": saved_bytes(peft.root, batch)}
            saved["free"] = saved_bytes(free.root, batch)
            key = f"r{rank}{end}"
            new: dict[str, Any] = {}
            for place, unit in ((0, ""), (1, "_cpu")):
                ours, theirs, bare = (times[run][place] for run in ("ours", "peft", "free"))
                new[f"tokens_per_second_over_peft_{key}{unit}"] = round(theirs / ours, 3)
                new[f"step_over_adapter_free_{key}{unit}"] = round(ours / bare, 3)
            new[f"saved_memory_over_peft_{key}"] = round(saved["ours"] / saved["peft"], 3)
            new |= {f"saved_bytes_{run}_{key}": count for run, count in saved.items()}
            new |= {f"seconds_{run}_{key}": round(pair[0], 4) for run, pair in times.items()}
            new |= {f"tokens_per_second_{run}_{key}": round(tokens / pair[0], 1) for run, pair in times.items()}
            show(new)
            figures |= new
            del engine, peft, free, runs
    return figures


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--quick", action="store_true", help="a toy size, to see that it runs")
    cli.add_argument("--hidden", type=int, default=1024)
    cli.add_argument("--intermediate", type=int, default=2816)
    cli.add_argument("--layers", type=int, default=3)
    cli.add_argument("--vocabulary", type=int, default=4096)
    cli.add_argument("--length", type=int, default=512)
    cli.add_argument("--batch", type=int, default=2)
    cli.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    cli.add_argument("--repeats", type=int, default=9)
    cli.add_argument(
        "--cases", nargs="+", choices=["float32", "bfloat16", "nf4"], default=["float32", "bfloat16", "nf4"]
    )
    args = cli.parse_args()
    if args.quick:
        args.hidden, args.intermediate, args.layers, args.vocabulary = 128, 256, 2, 128
        args.length, args.batch, args.repeats, args.ranks = 64, 1, 1, [16]
    if args.threads:
        torch.set_num_threads(args.threads)
    config = llama_config(
        hidden=args.hidden, intermediate=args.intermediate, layers=args.layers, vocabulary=args.vocabulary
    )
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    figures: dict[str, Any] = {}
    for case in args.cases:
        figures |= measure(case, config, args)
        write_result(args.json, figures, settings)


if __name__ == "__main__":
    main()
