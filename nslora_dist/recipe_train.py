"""The recipe's sections on how an adapter is trained: optimisation, engine, checkpoints."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from nslora_dist.errors import UserError
from nslora_dist.recipe_types import Count, Fraction, LocalPath, NonNegative, Positive, Section, Seed


class TrainSection(Section):
    """The optimisation: AdamW with decoupled weight decay, token-weighted loss."""

    learning_rate: Positive
    """Peak of AdamW's rate; an A frozen in the null space wants a much higher one than plain LoRA."""
    weight_decay: NonNegative = 0.0
    """Decoupled decay of what trains; wherever B starts from zero it pulls ΔW itself to zero."""
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] = (
        0.9,
        0.999,
    )
    """AdamW's averaging of gradients and of their squares."""
    max_steps: Count | None = None
    """Optimizer steps of the run; give either this or ``epochs``."""
    epochs: Positive | None = None
    """Passes over the rows, whole or not; give either this or ``max_steps``."""
    global_batch_size: Count = 128
    """Rows (with ``data.packing`` packs) of an optimizer step over all ranks, a multiple of micro-batch times ranks."""
    micro_batch_size: Count = 1
    """Rows of a rank in one forward pass; as many as fit, for sharded weights are gathered anew for each."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the rate rises linearly to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate goes on behind the warm-up: down to zero by a cosine or a line, or as it is."""
    max_grad_norm: Positive = 1.0
    """Norm over all trained parameters to which a step's gradient is clipped."""
    activation_checkpointing: bool = False
    """Computes each block's activations again in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile of each decoder block in training; its first steps take minutes. Not with zero3."""
    seed: Seed = 0
    """Decides the order of rows, plain LoRA's random A, and whatever is drawn in a step."""
    stop_after_skipped: Count = 3
    """Ends the run after so many steps in a row whose loss or gradient is not finite; each of them is skipped."""
    log_every: Count = 10
    """Optimizer steps between two points in TensorBoard, with the interference at that step."""
    update_grams: bool | None = None
    """Writes C = A G Aᵀ of some of the rows beside the adapter, for merging by ``gram``; null: for ``lora_null``."""

    @model_validator(mode="after")
    def _length(self) -> "TrainSection":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of max_steps and epochs")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is no multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step.

        Raises:
            UserError: the global batch does not divide over the ranks.
        """
        per_pass = self.micro_batch_size * world_size
        if self.global_batch_size % per_pass:
            raise UserError(
                f"train.global_batch_size {self.global_batch_size} is no multiple of micro_batch_size "
                f"{self.micro_batch_size} x {world_size} ranks; "
                f"use train.global_batch_size={-(-self.global_batch_size // per_pass) * per_pass}"
            )
        return self.global_batch_size // per_pass

    def fitting(self, world_size: int) -> "TrainSection":
        """The same with a global batch that divides over the ranks, for work on a recipe that trains nothing."""
        per_pass = self.micro_batch_size * world_size
        return self.model_copy(update={"global_batch_size": -(-self.global_batch_size // per_pass) * per_pass})


class EngineSection(Section):
    """Who shards parameters, gradients and optimizer state."""

    name: Literal["zero3", "fsdp2", "single"] = "zero3"
    """DeepSpeed ZeRO-3, PyTorch's FSDP2, or one process that shards nothing."""
    config: LocalPath | None = None
    """For zero3 alone: a DeepSpeed JSON file as in ``ds_configs/``: buckets, thresholds, overlap and CPU offload; what
    the recipe decides is refused there."""
    timeout_seconds: Annotated[float, Field(ge=1.0)] = 1800.0
    """Seconds without any progress, after which a rank counts as missing and all of them end."""

    def check_ranks(self, world_size: int) -> None:
        """Refuses an engine that shards nothing on several ranks.

        Raises:
            UserError: ``single`` and more than one rank.
        """
        if self.name == "single" and world_size > 1:
            raise UserError(
                f"engine.name single runs in one process, not on {world_size} ranks; use engine.name=fsdp2 or zero3"
            )


class CheckpointSection(Section):
    """When the state of training is written, how much of it is kept, and how long a pre-empted job takes to leave."""

    every: Count | None = 100
    """Optimizer steps between two checkpoints; null writes only at the end of training and when asked to stop."""
    keep_last: Count = 2
    """Checkpoints of each arm that stay on disk."""
    grace_seconds: Positive = 25.0
    """Seconds that a rank has left once it is asked to stop, as by SIGTERM; torchrun and deepspeed kill after 30."""
