"""The same code on CUDA over NCCL."""

from pathlib import Path

import pytest
import torch

from helpers.parity_run import cuda_losses
from helpers.ranks import run_ranks

CASES = ("delta", "bf16", "nf4_bf16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_engines_agree_on_cuda(world: Path) -> None:
    """Atomic sums and other tilings make a GPU's losses differ more than a CPU's: 1e-4 in float32, 2e-2 in bfloat16."""
    ranks = min(2, torch.cuda.device_count())
    (reference,) = run_ranks(cuda_losses, 1, "single", world, CASES, cuda=True)
    for engine in ("zero3", "fsdp2"):
        for losses in run_ranks(cuda_losses, ranks, engine, world, CASES, cuda=True):
            for case in CASES:
                tolerance = 1e-4 if case == "delta" else 2e-2
                assert losses[case] == pytest.approx(reference[case], rel=tolerance), f"{engine} {case}"
