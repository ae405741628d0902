"""What keeping to an interference budget costs a step, at the shapes of a LLaMA-3 8B.

    python benchmarks/budget.py [--json PATH] [--quick] [--threads 1] [--rank 64] [--ranks 8] [--tokens 4096]

One rank of ``--ranks``: B of all seven linears of 32 blocks as FSDP2 has them (DTensors sharded by rows), random, and
``Budget.enforce`` as the trainer calls it, once where every module is over its budget and is scaled (``bound``), once
where none is (``free``). Against it the time of one step's matrix products at the rate measured here for a frozen
linear's forward product (``--dtype``): 4 FLOPs a base parameter and token, for a frozen base has no weight gradients;
recomputing activations, attention, the adapters and the optimizer are left out, so the true share is lower. Left out of
``enforce``: the wait for other ranks in its one exchange, of 8 bytes a module.

``budget_share_of_step_bound`` and ``..._free``: enforce / step; ``tokens_for_one_percent_...``: of one rank and step,
from which on the share is below 1%. ``..._cpu`` is the same of processor time. With
``--ranks 512 --rank 16`` hardly any arithmetic is left: that is Python's part, which a GPU waits for.
"""

from typing import Any

import torch
from _common import median_wall_and_cpu, parser, write_result
from _models import show
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from nslora_dist import dist
from nslora_dist.adapter import AdaptedLinear
from nslora_dist.budget import Budget
from nslora_dist.calibration.store import MIXTURE
from nslora_dist.engines import base

BLOCK = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
"""(d_out, d_in) of a block's linears."""


class Rank:
    """The part of an FSDP2 engine that a budget touches."""

    def __init__(self, *, blocks: int, rank: int, ranks: int, device: torch.device) -> None:
        mesh = init_device_mesh(device.type, (1,))
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        self.optimizer = torch.optim.AdamW([torch.zeros(1)])
        for number in range(blocks):
            block = nn.Module()
            for name, (height, width) in BLOCK.items():
                rows = height // ranks
                made = AdaptedLinear(
                    nn.Identity(),
                    name=f"model.layers.{number}.{name}",
                    in_features=width,
                    out_features=rows,
                    rank=rank,
                    scale=1.0,
                    freeze_a=True,
                    residual=False,
                    dtype=torch.float32,
                )
                root = torch.randn(rank, rank, device=device)
                made.update_grams, made.references = {MIXTURE: root @ root.T}, {MIXTURE: 1e4}
                part = torch.randn(rows, rank, device=device)
                made.lora_B = nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)]))
                block.add_module(name.replace(".", "_"), made)
            self.model.layers.append(block)
        self.trained = base.trained_by_name(self.model)

    def shards(self, *, moments: bool = True) -> list[base.Shard]:
        return base.optimizer_shards(self.trained, self.optimizer, moments=moments)

    def masters(self, names: list[str]) -> list[Tensor]:
        return base.kept_of(self.trained[name] for name in names)

    def scale(self, factors: dict[str, float]) -> None:
        base.scale_parameters(self.trained, factors)


def linear_rate(device: torch.device, dtype: torch.dtype, tokens: int, repeats: int) -> tuple[float, float]:
    """FLOPs a second of wall and of processor time, of a 4096 x 4096 linear."""
    x = torch.randn(tokens, 4096, device=device, dtype=dtype)
    weight = torch.randn(4096, 4096, device=device, dtype=dtype)
    times = 20 if device.type == "cuda" else 1

    def run() -> Tensor:
        for _ in range(times):
            y = nn.functional.linear(x, weight)
        return y

    run()
    wall, cpu = median_wall_and_cpu(run, repeats)
    flops = 2.0 * tokens * 4096 * 4096 * times
    return flops / wall, flops / max(cpu, 1e-9)


def measure(args: Any, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    engine: Any = Rank(blocks=args.blocks, rank=args.rank, ranks=args.ranks, device=device)
    rates = linear_rate(device, getattr(torch, args.dtype), args.tokens if device.type == "cuda" else 512, args.repeats)
    parameters = args.blocks * sum(height * width for height, width in BLOCK.values())
    figures: dict[str, Any] = {"parameters": parameters, "modules": args.blocks * len(BLOCK)}
    figures["gflops_of_enforce"] = round(
        2e-9 * args.rank**2 * args.blocks * sum(h for h, _ in BLOCK.values()) / args.ranks, 3
    )
    for place, unit in ((0, ""), (1, "_cpu")):
        figures[f"gflops_a_second_linear{unit}"] = round(rates[place] * 1e-9, 1)
        figures[f"seconds_step{unit}"] = round(4.0 * parameters * args.tokens / rates[place], 4)
    start = Budget(engine, limit=1.0, over="module", device=device).measure()
    for case, limit in (("free", 2 * max(start.values())), ("bound", 0.999 * min(start.values()))):
        budget = Budget(engine, limit=limit, over="module", device=device)

        def enforce(budget: Budget = budget, shrink: bool = case == "bound") -> None:
            kept = budget.enforce()
            assert len(kept.factors) == (len(start) if shrink else 0)
            budget.limit *= 0.999 if shrink else 1.0  # so that the next call has as much to do

        enforce()
        times = median_wall_and_cpu(enforce, args.repeats)
        for place, unit in ((0, ""), (1, "_cpu")):
            figures[f"seconds_enforce_{case}{unit}"] = round(times[place], 5)
            if unit and device.type == "cuda":
                continue  # a GPU's step takes hardly any processor time
            share = times[place] * rates[place] / (4.0 * parameters * args.tokens)
            figures[f"budget_share_of_step_{case}{unit}"] = float(f"{share:.3g}")
            figures[f"tokens_for_one_percent_{case}{unit}"] = max(1, round(100 * share * args.tokens))
    show(figures)
    return figures


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--quick", action="store_true", help="two blocks, to see that it runs")
    cli.add_argument("--rank", type=int, default=64)
    cli.add_argument("--ranks", type=int, default=8)
    cli.add_argument("--blocks", type=int, default=32)
    cli.add_argument("--tokens", type=int, default=4096, help="of one rank in one step")
    cli.add_argument("--repeats", type=int, default=5)
    cli.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base's products")
    args = cli.parse_args()
    if args.quick:
        args.blocks, args.repeats = 2, 1
    if args.threads:
        torch.set_num_threads(args.threads)
    with dist.process_group() as device:
        figures = measure(args, device)
    write_result(args.json, figures, {name: value for name, value in vars(args).items() if name != "json"})


if __name__ == "__main__":
    main()
