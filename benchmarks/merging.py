"""One step of null-space compression: kept factors against the dense formulation, in time and in memory.

    python benchmarks/merging.py [--json PATH] [--quick] [--threads 1]

A LLaMA of random weights, K random adapters of rank r on all seven linears of every block, one batch of token ids a
task. A step is K forward and backward passes that add up λ's gradient; both formulations have the same loss, which is
checked.

- factored: the project's merged linears, W x + Σ λ_k B_k (A_k x);
- dense: every ΔW_k = B_k A_k made once and kept, W + Σ λ_k ΔW_k made in every forward pass, as merging code that works
  on state dicts does.

Each case has a process of its own. `bytes_added_...` is what building the updates and stepping adds to the process
with the base loaded, at its peak; `bytes_updates_...` is what the factors or the ΔW_k take by themselves. Figures:
`saved_memory_over_dense_k<K>_r<r>` (dense over factored), `step_time_over_dense_...` (below 1: factored is faster),
and how the added memory grows from the case with the smallest K · r to that with the largest, with the growth of the
factors by themselves beside it.
"""

import gc
import multiprocessing
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _common import machine, parser, write_result
from _models import llama_config, show
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nslora_dist.export import Factors
from nslora_dist.frozen import FrozenLinear
from nslora_dist.merging.blocks import block_of, target_blocks
from nslora_dist.merging.inputs import TaskInputs
from nslora_dist.merging.merged_linear import Coefficients, MergedLinear
from nslora_dist.merging.model import MergedModel
from nslora_dist.merging.nsc import task_gradient

HERE = torch.device("cpu")


class DenseMerged(MergedLinear):
    """The same module with every ΔW_k dense."""

    def make_dense(self) -> None:
        self.deltas = {
            k: self.lora_B[:, first:last] @ self.lora_A[first:last] for k, (first, last) in self.spans.items()
        }

    def forward(self, x: Tensor) -> Tensor:
        if self.current is not None and self.is_target:
            self._record(self.current, x, nn.functional.linear(x, self.lora_A))
        weight = self.base.weight
        row = self.coefficients.table[self.coefficients.rows[self.row]]
        for k, delta in self.deltas.items():
            weight = weight + row[k] * delta
        return nn.functional.linear(x, weight)


def base(size: dict[str, int]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = llama_config(**{name: size[name] for name in ("hidden", "intermediate", "layers", "vocabulary")})
    model = LlamaForCausalLM(config)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def build(model: LlamaForCausalLM, kind: type[MergedLinear], *, tasks: int, rank: int) -> MergedModel:
    generator = torch.Generator().manual_seed(1)
    plain = {name: m for name, m in model.model.named_modules() if isinstance(m, nn.Linear)}
    rows = list(dict.fromkeys(map(block_of, plain)))
    coefficients = Coefficients(rows, [0.4] * tasks, device=HERE)
    targets = target_blocks(plain, 0.25)
    linears = {}
    for name, linear in plain.items():
        frozen = FrozenLinear(linear, quantized=False, dtype=torch.float32)
        frozen.fill((linear.weight.detach(),), None)
        d_out, d_in = linear.weight.shape

        def draw(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator) * columns**-0.5

        updates = {k: Factors(draw(rank, d_in), 0.1 * draw(d_out, rank)) for k in range(tasks)}
        made = kind(frozen, name=name, row=block_of(name), updates=updates, coefficients=coefficients)
        made.is_target = block_of(name) in targets
        if isinstance(made, DenseMerged):
            made.make_dense()
        model.model.set_submodule(name, made)
        linears[name] = made
    return MergedModel(model.model, linears, coefficients)


def step(model: MergedModel, inputs: list[TaskInputs]) -> float:
    model.coefficients.table.grad = None
    rows = list(range(inputs[0].count))
    return sum(float(task_gradient(model, k, len(inputs), own, rows, device=HERE)) for k, own in enumerate(inputs))


def resident() -> tuple[int, int]:
    """Bytes of this process in memory, now and at its peak since it was last reset."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def case(answer: Any, kind: type[MergedLinear], size: dict[str, int], tasks: int, rank: int) -> None:
    """One formulation in a fresh process."""
    torch.set_num_threads(size["threads"])
    model = base(size)
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(3, size["vocabulary"], (tasks, size["batch"], size["length"]), generator=generator)
    inputs = [TaskInputs((), {"input_ids": ids}) for ids in drawn]
    with torch.no_grad():
        model.model(inputs[0].tensors["input_ids"])  # what the first pass of any kind allocates for good
    gc.collect()
    own = resident()[0]
    Path("/proc/self/clear_refs").write_text("5")
    merged = build(model, kind, tasks=tasks, rank=rank)
    loss, times = 0.0, []
    for _ in range(1 + size["repeats"]):
        start = time.perf_counter(), time.process_time()
        loss = step(merged, inputs)
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    updates = sum(p.numel() * 4 for m in merged.linears.values() for p in (m.lora_A, m.lora_B))
    for linear in merged.linears.values():
        updates += sum(d.numel() * 4 for d in linear.deltas.values()) if isinstance(linear, DenseMerged) else 0
    wall, cpu = (sorted(values)[len(values) // 2] for values in zip(*times[1:], strict=True))
    answer.put({"loss": loss, "added": resident()[1] - own, "updates": updates, "wall": wall, "cpu": cpu})


def measure(kind: type[MergedLinear], size: dict[str, int], tasks: int, rank: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=case, args=(answer, kind, size, tasks, rank))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{kind.__name__}, {tasks} tasks, rank {rank}: exit status {process.exitcode}"
    return answer.get()


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--quick", action="store_true", help="a toy size, to see that it runs")
    cli.add_argument("--hidden", type=int, default=1024)
    cli.add_argument("--intermediate", type=int, default=2816)
    cli.add_argument("--layers", type=int, default=4)
    cli.add_argument("--vocabulary", type=int, default=4096)
    cli.add_argument("--length", type=int, default=256)
    cli.add_argument("--batch", type=int, default=2)
    cli.add_argument("--tasks", type=int, nargs="+", default=[2, 6])
    cli.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    cli.add_argument("--repeats", type=int, default=3)
    args = cli.parse_args()
    if args.quick:
        args.hidden, args.intermediate, args.layers, args.vocabulary = 128, 256, 2, 128
        args.length, args.batch, args.tasks, args.ranks, args.repeats = 32, 1, [2], [4, 8], 1
    names = ("hidden", "intermediate", "layers", "vocabulary", "length", "batch", "repeats")
    size = {name: getattr(args, name) for name in names} | {"threads": args.threads or machine()["threads"]}
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    figures: dict[str, Any] = {}
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for tasks, rank in product(args.tasks, args.ranks):
        ours, dense = (measure(kind, size, tasks, rank) for kind in (MergedLinear, DenseMerged))
        assert abs(ours["loss"] - dense["loss"]) < 1e-4, (ours["loss"], dense["loss"])
        found[tasks, rank] = ours
        key = f"k{tasks}_r{rank}"
        new = {
            f"saved_memory_over_dense_{key}": round(dense["added"] / max(ours["added"], 1), 2),
            f"step_time_over_dense_{key}": round(ours["wall"] / dense["wall"], 3),
            f"step_time_over_dense_{key}_cpu": round(ours["cpu"] / dense["cpu"], 3),
        }
        for name, run in (("factored", ours), ("dense", dense)):
            new |= {f"bytes_added_{name}_{key}": run["added"], f"bytes_updates_{name}_{key}": run["updates"]}
            new[f"seconds_step_{name}_{key}"] = round(run["wall"], 4)
        show(new)
        figures |= new
        write_result(args.json, figures, settings)
    least, most = min(found, key=lambda c: c[0] * c[1]), max(found, key=lambda c: c[0] * c[1])
    new = {
        "bytes_added_growth_factored": found[most]["added"] - found[least]["added"],
        "bytes_updates_growth_factored": found[most]["updates"] - found[least]["updates"],
    }
    show(new)
    figures |= new
    write_result(args.json, figures, settings)


if __name__ == "__main__":
    main()
