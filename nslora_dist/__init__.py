"""Fine-tune large LLaMA-layout models in the null space of what they already know, on 1 to 64 GPUs."""

__version__ = "0.1.0"
