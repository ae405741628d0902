"""The recipe's section on EleutherAI's lm-eval, the field's own harness."""

from typing import Annotated

from pydantic import Field, field_validator

from nslora_dist.recipe_types import MOST, Count, Names, Section, Where


class LmEvalSection(Section):
    """Tasks of lm-eval, run on the base and on every arm through the engine's own sharded model."""

    tasks: Names
    """Its tasks and groups."""
    limit: Annotated[int, Field(ge=1, le=MOST)] | Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """The first so many questions of each task, or that share of them; all where it is left out."""
    num_fewshot: Annotated[int, Field(ge=0, le=MOST)] | None = None
    """Solved examples before each question; each task's own where it is left out."""
    include_path: Where | None = None
    """A folder of task files besides lm-eval's own; ``!function`` in one runs Python from that folder."""
    batch_size: Count = 8
    """Rows a rank and pass."""
    before: bool = True
    """Run it on the base as well, once for all arms."""
    apply_chat_template: bool = False
    """Put questions into the tokenizer's chat template."""
    allow_code_execution: bool = False
    """For HumanEval, MBPP and the like: programs that the model wrote run on this machine."""

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({task for task in tasks if tasks.count(task) > 1})
        if twice:
            raise ValueError(f"names '{twice[0]}' twice; leave one out")
        return tasks
