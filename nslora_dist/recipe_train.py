"""The recipe's sections on how an adapter is trained: optimisation, engine, checkpoints."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from nslora_dist.errors import UserError
from nslora_dist.recipe_types import Count, Fraction, NonNegative, Positive, Section, Seed, Where


class TrainSection(Section):
    """The optimisation: AdamW with decoupled weight decay, token-weighted loss."""

    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] = (
        0.9,
        0.999,
    )
    max_steps: Count | None = None
    epochs: Positive | None = None
    global_batch_size: Count = 128
    micro_batch_size: Count = 1
    warmup_ratio: Fraction = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: Positive = 1.0
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile of each decoder block; its first steps take minutes
    seed: Seed = 0
    stop_after_skipped: Count = 3  # steps in a row whose loss or gradient is not finite: each is skipped, then it ends
    log_every: Count = 10
    update_grams: bool | None = None  # C = A G Aᵀ of the task beside the adapter, for merging; default: for lora_null

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
    config: Where | None = None
    timeout_seconds: Annotated[float, Field(ge=1.0)] = 1800.0  # without any progress: then a rank is missing

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

    every: Count | None = 100  # optimizer steps; null writes only at the end of training and on SIGTERM
    keep_last: Count = 2
    grace_seconds: Positive = 25.0  # torchrun and deepspeed kill what is left 30 s after passing SIGTERM on
