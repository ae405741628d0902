"""The recipe's section on EleutherAI's lm-eval, the field's own harness."""

from typing import Annotated

from pydantic import Field, field_validator

from nslora_dist.recipe_types import MOST, Count, Names, Section, Where


class LmEvalSection(Section):
    """Tasks of lm-eval, run on the base and on every arm through the engine's own sharded model.

    ``include_path`` is a folder of task files besides lm-eval's own; ``!function`` in one runs Python from that folder.
    """

    tasks: Names
    limit: Annotated[int, Field(ge=1, le=MOST)] | Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # or a share
    num_fewshot: Annotated[int, Field(ge=0, le=MOST)] | None = None  # each task's own where it is left out
    include_path: Where | None = None
    batch_size: Count = 8
    before: bool = True  # on the base as well, once for all arms
    apply_chat_template: bool = False
    allow_code_execution: bool = False  # HumanEval, MBPP: programs that the model wrote run on this machine

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({task for task in tasks if tasks.count(task) > 1})
        if twice:
            raise ValueError(f"names '{twice[0]}' twice; leave one out")
        return tasks
