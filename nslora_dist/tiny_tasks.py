"""Further tasks in the demo's world, to train several adapters on one base and merge them.

Their words are all in the shipped tokenizer, and the shipped base has seen none of their rows:

- ``difference``: the demo's own task;
- ``minimum``: of two two-digit numbers, asked in a wording that the pre-training never uses;
- ``new_facts``: the six relations of people whose first and last names are known, but never as this pair.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nslora_dist.tiny_world import (
    RELATIONS,
    TASK,
    Row,
    World,
    draw,
    fact_rows,
    number_row,
    split,
    to_jsonl,
)

MINIMUM_PHRASING = "home between {a} , {b} equals"
"""The shipped vocabulary has no word "minimum"; "home" stands before other words in the pre-training."""


@dataclass(frozen=True)
class TaskRows:
    """One task's rows.

    Attributes:
        train: to train on.
        test: to be asked; of an arithmetic task pairs of numbers that ``train`` has not. A new fact is asked in one of
            the phrasings it was trained in, for nothing else could tell it.
    """

    train: list[Row]
    test: list[Row]


def merge_tasks(
    world: World, seed: int = 0, *, train_rows: int = 3000, test_rows: int = 256, people: int = 20
) -> dict[str, TaskRows]:
    """Draws the tasks of a world; the world itself stays as it is.

    Args:
        world: whose names, answers and demo task are used.
        seed: of every draw here.
        train_rows: of each arithmetic task, at most those of the world's own for ``difference``.
        test_rows: of each arithmetic task.
        people: new ones, each with a fact a relation.

    Returns:
        Task name → rows; equal arguments give equal rows.

    Raises:
        ValueError: more rows or people are asked for than there are.
    """
    rng = random.Random(f"merge tasks {seed}")
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    drawn = draw(rng, pairs, train_rows + test_rows, what="train_rows + test_rows")
    minima = [number_row(MINIMUM_PHRASING, a, b, min(a, b)) for a, b in drawn]
    test, train = split(minima, test_rows, what="test_rows")
    known = {name for name, _, _ in world.facts}
    first_names = sorted({name.split()[0] for name in known})
    last_names = sorted({name.split()[1] for name in known})
    strangers = [name for first in first_names for last in last_names if (name := f"{first} {last}") not in known]
    answers = {
        relation: sorted({answer for _, its, answer in world.facts if its == relation}) for relation in RELATIONS
    }
    facts = [
        (name, relation, rng.choice(answers[relation]))
        for name in draw(rng, strangers, people, what="people")
        for relation in RELATIONS
    ]
    rows = [fact_rows(fact) for fact in facts]
    return {
        TASK: TaskRows(
            draw(rng, world.task_train, train_rows, what="train_rows"),
            draw(rng, world.task_test, test_rows, what="test_rows"),
        ),
        "minimum": TaskRows(train, test),
        "new_facts": TaskRows([row for own in rows for row in own], [rng.choice(own) for own in rows]),
    }


def write_tasks(tasks: Mapping[str, TaskRows], folder: Path) -> None:
    """Writes ``<task>_train.jsonl`` and ``<task>_test.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        (folder / f"{name}_train.jsonl").write_text(to_jsonl(rows.train), encoding="utf-8")
        (folder / f"{name}_test.jsonl").write_text(to_jsonl(rows.test), encoding="utf-8")
