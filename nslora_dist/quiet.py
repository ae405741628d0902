"""Silences messages of other packages that tell a user of this one nothing; every other warning stays."""

import logging
import os
import warnings

# Read when PyTorch loads: its warnings carry a C++ stack, one for every store or socket of a rank that is gone.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def quiet() -> None:
    """Call it before DeepSpeed, PEFT or bitsandbytes are imported."""
    import torch

    # 4-bit weights are unpacked before the product here (linear.py), so an optional kernel for it is never missed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "Failed to load CPU gemm_4bit_forward" not in record.getMessage()
    )
    # DeepSpeed calls collectives by names that newer PyTorch versions have renamed.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it chose just that
