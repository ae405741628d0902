"""How long training waits for a checkpoint, against how long the disk takes; and how long taking it up takes.

One rank's part of an adapter at LLaMA-3-8B's shapes, all linears, A frozen: what `Checkpoints.start` copies to host
memory is what training waits for; the rest is written behind the next steps.
"""

import tempfile
import time
from pathlib import Path

import torch
from _common import median_seconds, parser, write_result

from nslora_dist.checkpoint import Checkpoints
from nslora_dist.checkpoint_files import KINDS
from nslora_dist.engines.base import Shard
from nslora_dist.recipe import CheckpointSection

OUTPUTS = (4096, 1024, 1024, 4096, 14336, 14336, 4096)
"""d_out of q, k, v, o, gate, up and down."""
BELONGS = {"train": {"seed": 0, "betas": [0.9, 0.999], "weight_decay": 0.0}}


class Part:
    """One rank's shards of B and its moments, where an engine would stand."""

    def __init__(self, *, rank: int, ranks: int, blocks: int) -> None:
        self.kept = []
        for block in range(blocks):
            for number, rows in enumerate(OUTPUTS):
                values = {kind: torch.randn(rows * rank // ranks) for kind in KINDS}
                self.kept.append(Shard(f"layers.{block}.{number}.lora_B", (rows // ranks, rank), 0, values))

    def shards(self) -> list[Shard]:
        """Views, as an engine's."""
        return self.kept

    def restore(self, shards: list[Shard], *, updates: int) -> None:
        """Copies them, as an engine does."""
        for own, given in zip(self.kept, shards, strict=True):
            for kind, value in own.values.items():
                value.copy_(given.values[kind])


def main() -> None:
    """Measures and prints."""
    options = parser(__doc__)
    options.add_argument("--rank", type=int, default=64)
    options.add_argument("--ranks", type=int, default=8, help="of the run, of which one is measured")
    options.add_argument("--folder", type=Path, help="on the disk to be measured (default: the temporary files')")
    options.add_argument("--quick", action="store_true", help="two blocks, once")
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    blocks, repeats = (2, 1) if args.quick else (32, 5)
    part = Part(rank=args.rank, ranks=args.ranks, blocks=blocks)
    facts = {"updates": 1, "losses": [1.0], "seconds": 0.0}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        kept = Checkpoints(Path(name), CheckpointSection(keep_last=2), belongs_to=BELONGS, engine="single")
        waits, wholes = [], []
        for step in range(1, repeats + 1):
            started = time.perf_counter()
            kept.start(part, step, facts)  # type: ignore[arg-type]
            waits.append(time.perf_counter() - started)
            kept.finish()
            wholes.append(time.perf_counter() - started)
        found = Checkpoints(Path(name), CheckpointSection(), belongs_to=BELONGS, engine="single")
        look = median_seconds(found.look, repeats)
        restore = median_seconds(lambda: found.restore(part), repeats)  # type: ignore[arg-type]
    size = sum(value.nbytes for shard in part.kept for value in shard.values.values())
    wait, whole = sorted(waits)[len(waits) // 2], sorted(wholes)[len(wholes) // 2]
    figures = {
        "bytes_of_the_part": size,
        "seconds_training_waits": wait,
        "seconds_until_committed": whole,
        "wait_over_whole": wait / whole,
        "seconds_to_check_every_byte": look,
        "seconds_to_take_it_up": restore,
    }
    for key, value in figures.items():
        print(f"{key:<28} {value:.4g}")
    write_result(args.json, figures, {"rank": args.rank, "ranks": args.ranks, "blocks": blocks, "repeats": repeats})


if __name__ == "__main__":
    main()
