"""The recipe's sections on how an adapter is trained: optimisation, engine, checkpoints."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from nslora_dist.errors import UserError
from nslora_dist.recipe_types import Count, Fraction, NonNegative, Positive, Section, Seed, Where


class TrainSection(Section):
    """The optimisation: AdamW with decoupled weight decay, token-weighted loss."""

    learning_rate: Positive
    """The highest, after the warm-up. A frozen A in a null space wants ten times plain LoRA's."""
    weight_decay: NonNegative = 0.0
    """Decoupled; in delta form it pulls the update itself to zero."""
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] = (
        0.9,
        0.999,
    )
    """AdamW's."""
    max_steps: Count | None = None
    """Optimizer steps; this or ``epochs``."""
    epochs: Positive | None = None
    """Passes over the rows, parts of one allowed; this or ``max_steps``."""
    global_batch_size: Count = 128
    """Rows an optimizer step, over all ranks; what the ranks' micro-batches leave is accumulated."""
    micro_batch_size: Count = 1
    """Rows a rank and forward pass."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    max_grad_norm: Positive = 1.0
    """The gradient is clipped to this norm, over all trained parameters."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    compile: bool = False
    """torch.compile of each block; its first steps take minutes. Not with zero3."""
    seed: Seed = 0
    """Of the order of rows and of what is drawn at random."""
    stop_after_skipped: Count = 3
    """A step whose loss or gradient is not finite is skipped; after so many in a row the run ends."""
    log_every: Count = 10
    """Steps between two lines of the log and TensorBoard."""
    update_grams: bool | None = None
    """Keep A G Aᵀ of the task beside the adapter, for ``gram`` merging; where it is left out, for ``lora_null``."""

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
    """DeepSpeed ZeRO-3, PyTorch's fully_shard, or one process that shards nothing."""
    config: Where | None = None
    """Of zero3: a DeepSpeed file, as in ``ds_configs/``, of which buckets, thresholds and CPU offload are taken."""
    timeout_seconds: Annotated[float, Field(ge=1.0)] = 1800.0
    """Without any progress of a rank for so long, the others take it for lost and end."""

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
    """Optimizer steps; null writes only at the end of training and on SIGTERM."""
    keep_last: Count = 2
    """Checkpoints that stay on disk."""
    grace_seconds: Positive = 25.0
    """Time to leave after SIGTERM; torchrun and deepspeed kill what is left 30 s after passing it on."""
