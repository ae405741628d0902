"""The recipe's section on EleutherAI's lm-eval, the field's own harness."""

from typing import Annotated

from pydantic import Field, field_validator

from nslora_dist.recipe_types import MOST, Count, LocalPath, Names, Section


class LmEvalSection(Section):
    """Tasks of lm-eval, run on the base and on every arm through the engine's own sharded model."""

    tasks: Names
    """Tasks, groups or tags as ``lm_eval ls tasks`` lists them; loaded before anything is trained."""
    limit: Annotated[int, Field(ge=1, le=MOST)] | Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """The first so many questions of each task, or that share of them; null asks them all."""
    num_fewshot: Annotated[int, Field(ge=0, le=MOST)] | None = None
    """Examples before each question, in place of each task's own number; a task that is made for none keeps none."""
    include_path: LocalPath | None = None
    """Folder of task files besides lm-eval's own; ``!function`` in one runs Python from that folder."""
    batch_size: Count = 8
    """Rows of a rank in one forward pass."""
    before: bool = True
    """Whether the base is asked as well, once for all arms."""
    apply_chat_template: bool = False
    """Puts questions into the tokenizer's chat template, examples as turns of their own; for bases tuned to chat."""
    allow_code_execution: bool = False
    """Lets tasks such as HumanEval and MBPP run programs that the model wrote on this machine."""

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({task for task in tasks if tasks.count(task) > 1})
        if twice:
            raise ValueError(f"names '{twice[0]}' twice; leave one out")
        return tasks
