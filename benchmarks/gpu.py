"""One CUDA GPU: calibration, solver and training steps at the shapes of LLaMA-3 8B (bfloat16) and 70B (NF4).

    python benchmarks/gpu.py --case llama3_8b_bf16 [--json PATH]      (and llama3_70b_nf4; --quick for a toy on any CPU)

Needs torch, transformers, safetensors and, for NF4, bitsandbytes; no checkpoint: weights are random, drawn block by
block on the device, so that 70B in NF4 (37 GB) is never held wider. Per case:

- the chip's bfloat16 rate, measured by a large product in the same run;
- calibration of 256 × 2,048 tokens: `--blocks` of the model's blocks go through (all of 8B, 8 of 70B), and
  `seconds_calibration` is scaled to all of them (`blocks_measured` says by what); drawing weights is timed apart;
- the solver of each group of one block (fast), and eigh on the block's first group for comparison;
- training steps at sequence length 2,048, rank 16, all seven linears; 70B with activation checkpointing.

`share_of_matrix_rate_...` is the useful arithmetic over time and measured rate; what checkpointing computes again is
not useful. Memory is PyTorch's peak; `..._planned` is what `nslora_dist.plan` says, where that can be imported.
"""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from _common import parser, write_result
from _models import block_shapes, llama_config, show, token_batches, wait
from torch import Tensor, nn
from transformers import LlamaConfig

from nslora_dist.attach import attach_adapters
from nslora_dist.base_model import blocks, build_empty, units
from nslora_dist.base_weights import fill_unit, finish
from nslora_dist.batches import Batch
from nslora_dist.calibration.grams import Collector, GroupSums
from nslora_dist.calibration.solve import solve_group
from nslora_dist.calibration.stream import BlockStream, Texts
from nslora_dist.frozen import FrozenLinear
from nslora_dist.input_groups import input_groups, target_groups
from nslora_dist.null_space import null_basis
from nslora_dist.supervised import SupervisedModel

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES: dict[str, dict[str, Any]] = {
    "llama3_8b_bf16": {
        "shape": {"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "key_values": 8},
        "quantization": "none",
        "blocks": 32,
        "checkpointing": False,
        "rows": 2,
    },
    "llama3_70b_nf4": {
        "shape": {"hidden": 8192, "intermediate": 28672, "layers": 80, "heads": 64, "key_values": 8},
        "quantization": "nf4",
        "blocks": 8,
        "checkpointing": True,
        "rows": 2,
    },
}
QUICK = {"hidden": 128, "intermediate": 256, "layers": 2, "heads": 2, "key_values": 1}


class RandomWeights:
    """Stands in for a checkpoint: every tensor drawn where it is asked for."""

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """There is every tensor, of every shape."""

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype,
        device: torch.device,
        rows: slice | None = None,
    ) -> Tensor:
        """Normal with variance 1/d_in; ones for norms."""
        if rows is not None:
            shape = (rows.stop - rows.start, *shape[1:])
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, shape[1] ** -0.5)


class Case:
    """One model shape on one device."""

    def __init__(self, name: str, args: Any) -> None:
        self.name, self.args, self.facts = name, args, CASES[name]
        self.here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        shape = QUICK if args.quick else self.facts["shape"]
        self.config: LlamaConfig = llama_config(vocabulary=256 if args.quick else 128256, **shape)
        # Values as a recipe has them, by name alone: the recipe's own classes need a package that may be missing.
        self.base = SimpleNamespace(
            path=name,
            dtype="bfloat16",
            quantization=self.facts["quantization"],
            attention="sdpa",
            trust_remote_code=False,
            config=None,
        )
        self.adapter = SimpleNamespace(
            method="lora_null",
            form="delta",
            rank=args.rank,
            scale=1.0,
            target_modules=LINEARS,
            a_is_frozen=True,
            a_init="projected",
        )
        self.section = SimpleNamespace(solver=SimpleNamespace(method="fast"), seed=0)
        self.products = sum(torch.Size(s).numel() for s in block_shapes(self.config).values() if len(s) == 2)

    def attention_flops(self, length: int) -> float:
        """Forward, per token and block, causal: scores and values over half of the positions."""
        return 2.0 * self.config.hidden_size * length

    def rate(self) -> float:
        """bfloat16 FLOP/s of a large product."""
        size = 256 if self.args.quick else 8192
        left, right = (torch.randn(size, size, device=self.here, dtype=torch.bfloat16) for _ in range(2))
        return 2.0 * size**3 / seconds(lambda: torch.mm(left, right), repeats=10)

    def calibration(self, rate: float) -> dict[str, Any]:
        args = self.args
        model = build_empty(self.base, self.config)
        groups = target_groups(input_groups(model), self.adapter)
        reset_memory()
        batches = token_batches(
            args.sequences // args.batch, rows=args.batch, length=args.length, vocabulary=self.config.vocab_size
        )
        stream = BlockStream(model, RandomWeights(), device=self.here, place="device")  # type: ignore[arg-type]
        texts = Texts("text", batches, device=self.here, keep=self.here)
        stream.embed([texts])
        count = min(args.blocks or self.facts["blocks"], self.config.num_hidden_layers)
        loading, passing, solving = [], [], []
        found: dict[str, Any] = {}
        for number in range(count):
            loading.append(once(lambda number=number: stream.load(number)))
            name, block = stream.blocks[number]
            mine = [group for group in groups if group.name.startswith(f"{name}.")]
            sums = {group.name: GroupSums(group, basis=None, device=self.here) for group in mine}
            passing.append(once(lambda number=number, m=mine, s=sums: self.one_pass(stream, number, texts, m, s)))
            if number == count - 1:
                found = self.solve(name, block, mine, sums, solving)
            del sums
            stream.release(number)
        layers, tokens = self.config.num_hidden_layers, len(batches) * args.batch * args.length
        # The first pass also waits for kernels to be chosen.
        median = statistics.median(passing[1:] or passing)
        widths = [group.in_features for group in mine]
        useful = (
            2.0 * self.products + self.attention_flops(args.length) + sum(width * (width + 1.0) for width in widths)
        )
        return found | {
            "blocks_measured": count,
            "seconds_calibration_block": round(median, 4),
            "seconds_calibration": round(median * layers, 2),
            "seconds_solve": round(sum(solving) * layers, 2),
            "seconds_draw_and_pack_block": round(statistics.median(loading[1:] or loading), 4),
            "tokens_per_second_calibration": round(tokens / (median * layers), 1),
            "share_of_matrix_rate_calibration": round(useful * tokens / median / rate, 4),
            "bytes_peak_calibration": peak_memory(),
        }

    def one_pass(self, stream: BlockStream, number: int, texts: Texts, groups: Any, sums: dict[str, GroupSums]) -> None:
        stream.run(number, texts, Collector(groups, sums))
        for total in sums.values():
            total.finish()

    def solve(
        self, name: str, block: nn.Module, groups: Any, sums: dict[str, GroupSums], solving: list[float]
    ) -> dict[str, Any]:
        """Every group of a block, twice: the first call of a size loads its kernels."""
        figures: dict[str, Any] = {}
        for place, group in enumerate(groups):
            gram, energy = sums[group.name].gram, float(sums[group.name].energy)
            assert gram is not None
            weights = {}
            for shape in group.modules:
                linear = block.get_submodule(shape.name.removeprefix(f"{name}."))
                assert isinstance(linear, FrozenLinear)
                weights[shape.name] = linear.dense(linear.weight)

            def run(gram: Tensor = gram, weights: dict[str, Tensor] = weights, energy: float = energy) -> None:
                solve_group(
                    {"text": gram},
                    weights,
                    source_weights={"text": 1.0},
                    traces={"text": energy},
                    adapter=self.adapter,  # type: ignore[arg-type]
                    section=self.section,  # type: ignore[arg-type]
                )

            run()
            solving.append(once(run))
            figures[f"seconds_solve_{group.name.rsplit('.', 1)[1]}"] = round(solving[-1], 3)
            if place == 0:
                for method in ("fast", "eigh"):
                    taken = once(lambda method=method, gram=gram: null_basis(gram, rank=self.args.rank, method=method))
                    figures[f"seconds_{method}_{group.in_features}"] = round(taken, 3)
            sums[group.name].gram = None
        return figures

    def training(self, rate: float) -> dict[str, Any]:
        args, rows = self.args, self.args.rows or self.facts["rows"]
        reset_memory()
        start = time.perf_counter()
        root, trained = self.trainable()
        wait()
        built = time.perf_counter() - start
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
        batch = token_batches(1, rows=rows, length=args.length, vocabulary=self.config.vocab_size)[0].to(self.here)
        figures: dict[str, Any] = {"seconds_build": round(built, 2), "bytes_model": memory_now()}
        taken = [once(lambda: step(root, batch, trained, optimizer)) for _ in range(args.steps + 2)][2:]
        tokens, median = batch.token_count, statistics.median(taken)
        layers, head = self.config.num_hidden_layers, 4.0 * self.config.vocab_size * self.config.hidden_size
        # Forward and the inputs' gradients: a frozen weight has no gradient of its own. Attention: 1 + 2.5 times.
        useful = layers * (4.0 * self.products + 3.5 * self.attention_flops(args.length)) + head
        return figures | {
            "seconds_step": round(median, 4),
            "rows_per_step": rows,
            "tokens_per_second_step": round(tokens / median, 1),
            "share_of_matrix_rate_step": round(useful * tokens / median / rate, 4),
            "bytes_peak_step": peak_memory(),
        }

    def trainable(self) -> tuple[SupervisedModel, list[nn.Parameter]]:
        model = build_empty(self.base, self.config)
        groups = target_groups(input_groups(model), self.adapter)
        attach_adapters(model, groups, self.adapter, torch.float32)
        for name, unit in units(model):
            fill_unit(unit, name, RandomWeights(), device=self.here)  # type: ignore[arg-type]
            for module in unit.modules():
                if hasattr(module, "lora_A"):
                    a = torch.randn(module.lora_A.shape, device=self.here) / module.lora_A.shape[1] ** 0.5
                    module.fill(a, None, device=self.here)
        finish(model, device=self.here)
        if self.facts["checkpointing"]:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert blocks(model)
        root = SupervisedModel(model).train()
        return root, [parameter for parameter in root.parameters() if parameter.requires_grad]

    def planned(self) -> dict[str, Any]:
        """The plan's memory of a training step on one device, where its packages are there."""
        try:
            from nslora_dist.plan import memory, shapes, zero3
        except ImportError:
            return {}
        recipe: Any = SimpleNamespace(
            base_model=self.base, adapter=self.adapter, engine=SimpleNamespace(name="single", config=None)
        )
        found = shapes.shapes_of(recipe, self.config)
        batch = memory.Batch(rows=self.args.rows or self.facts["rows"], length=self.args.length)
        checkpointing = self.facts["checkpointing"]
        held, _ = memory.state(found, 1, "single", zero3.Knobs())
        parts = [held]
        parts.append(memory.saved(found, batch, attention="sdpa", checkpointing=checkpointing, engine="single"))
        parts.append(memory.transient(found, batch, attention="sdpa", checkpointing=checkpointing))
        return {"bytes_peak_step_planned": int(sum(sum(part.values()) for part in parts))}


def step(root: nn.Module, batch: Batch, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    (root(batch) / batch.supervised_tokens).backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def once(run: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def seconds(run: Callable[[], object], *, repeats: int) -> float:
    for _ in range(3):
        run()
    return statistics.median(once(run) for _ in range(repeats))


def reset_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def memory_now() -> int | None:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else None


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--quick", action="store_true", help="toy shapes and few tokens; runs without a GPU")
    cli.add_argument("--case", nargs="+", choices=sorted(CASES), default=["llama3_8b_bf16"])
    cli.add_argument("--rank", type=int, default=16)
    cli.add_argument("--length", type=int, default=2048)
    cli.add_argument("--sequences", type=int, default=256, help="calibrated on")
    cli.add_argument("--batch", type=int, default=8, help="sequences of a calibration pass")
    cli.add_argument("--blocks", type=int, help="blocks calibrated (default: the case's)")
    cli.add_argument("--rows", type=int, help="of a training step (default: the case's)")
    cli.add_argument("--steps", type=int, default=8)
    cli.add_argument("--skip", nargs="+", choices=["calibration", "training"], default=[])
    args = cli.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.length, args.sequences, args.batch, args.steps = 32, 4, 2, 1
    elif not torch.cuda.is_available():
        cli.error("no CUDA device here; --quick runs toy shapes on the CPU")
    settings = {name: value for name, value in vars(args).items() if name != "json"} | {"cases": CASES}
    figures: dict[str, Any] = {}

    def add(new: dict[str, Any], end: str = "") -> None:
        named = {f"{name}{end}": value for name, value in new.items()}
        show(named)
        figures.update(named)
        write_result(args.json, figures, settings)

    for name in args.case:
        torch.manual_seed(0)
        case = Case(name, args)
        rate = case.rate()
        add({"bf16_flops_per_second": rate}, f"_{name}")
        if "calibration" not in args.skip:
            with torch.no_grad():
                add(case.calibration(rate), f"_{name}")
        if "training" not in args.skip:
            add(case.training(rate) | case.planned(), f"_{name}")


if __name__ == "__main__":
    main()
