"""Fine-tune large LLaMA-layout models in the null space of what they already know, on 1 to 64 GPUs.

For people with a trainer of their own: ``calibrate`` a live Hugging Face model, ``init_peft`` a PEFT model with what
was found, and ask ``peft_interference`` what it disturbs.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["calibrate", "init_peft", "peft_interference"]


def __getattr__(name: str) -> Any:
    # On first use: importing the package alone should not cost PyTorch's seconds.
    if name == "calibrate":
        from nslora_dist.live_calibration import calibrate

        return calibrate
    if name in ("init_peft", "peft_interference"):
        from nslora_dist import peft_start

        return getattr(peft_start, name)
    raise AttributeError(f"module 'nslora_dist' has no attribute '{name}'")
