"""What a study's base knows, piece by piece: the texts to calibrate on, the questions, and the new tasks' rows."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nslora_dist.study.spec import FOREIGN, Size, StudyCalibration, TaskRows
from nslora_dist.tiny_tasks import merge_tasks, write_tasks
from nslora_dist.tiny_world import SKILLS, SPECIAL_TOKENS, Row, World, fact_rows, make_world, text_of, to_jsonl

FOREIGN_TEXTS = 4096


@dataclass(frozen=True)
class Knowledge:
    """A world cut into ``spec.PIECES``.

    Attributes:
        world: all of it.
        texts: piece, or ``spec.FOREIGN``, → texts to draw a calibration or a probe from.
        asked: piece → questions; of the skills about pairs of numbers that no text has.
    """

    world: World
    texts: dict[str, list[str]]
    asked: dict[str, list[Row]]


def make_knowledge(size: Size, tasks: TaskRows) -> Knowledge:
    """Draws a world and cuts it into pieces; equal arguments give equal pieces.

    Raises:
        ValueError: more people or rows are asked for than there are.
    """
    if size.people < 2:
        raise ValueError(f"people={size.people}: one half is named in calibration, the other is not; give at least 2")
    world = make_world(
        size.seed,
        people=size.people,
        task_train_rows=tasks.train_rows,
        task_test_rows=size.asked,
        skill_test_rows=size.asked,
        calibration_rows=0,
        probe_rows=0,
    )
    rng = random.Random(f"knowledge {size.seed}")
    named = set(list(dict.fromkeys(name for name, _, _ in world.facts))[: size.people // 2])
    own = [fact_rows(fact) for fact in world.facts if fact[0] in named]
    others = [fact_rows(fact) for fact in world.facts if fact[0] not in named]
    rows = {
        "facts_named": [row for said in own for row in said[:-1]],
        "facts_unnamed": [row for said in others for row in said],
        "facts_rephrased": [said[-1] for said in own],
    } | {skill: world.pretraining[skill] for skill in SKILLS}
    questions = {
        "facts_named": [rng.choice(said[:-1]) for said in own],
        "facts_unnamed": [rng.choice(said) for said in others],
        "facts_rephrased": [said[-1] for said in own],
    }
    asked = {piece: rng.sample(found, min(size.asked, len(found))) for piece, found in questions.items()}
    words = [word for word in world.vocabulary if word not in SPECIAL_TOKENS]
    foreign = [" ".join(rng.choices(words, k=rng.randint(5, 12))) for _ in range(FOREIGN_TEXTS)]
    texts = {piece: [text_of(row) for row in found] for piece, found in rows.items()}
    return Knowledge(world, texts | {FOREIGN: foreign}, asked | {skill: world.retention[skill] for skill in SKILLS})


def write_knowledge(
    knowledge: Knowledge,
    folder: Path,
    *,
    size: Size,
    tasks: TaskRows,
) -> None:
    """Writes ``text_<piece>.jsonl``, ``asked_<piece>.jsonl`` and each task's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for piece, texts in knowledge.texts.items():
        write_texts(folder / f"text_{piece}.jsonl", texts)
    for piece, rows in knowledge.asked.items():
        (folder / f"asked_{piece}.jsonl").write_text(to_jsonl(rows), encoding="utf-8")
    drawn = merge_tasks(
        knowledge.world, size.seed, train_rows=tasks.train_rows, test_rows=size.asked, people=tasks.people
    )
    write_tasks(drawn, folder)


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """Writes texts, one JSON object a line."""
    path.write_text(to_jsonl([{"text": text} for text in texts]), encoding="utf-8")


def source_texts(texts: Mapping[str, Sequence[str]], calibration: StudyCalibration, source: str) -> list[str]:
    """All texts of a calibration's source."""
    return [text for piece in calibration.sources[source].texts for text in texts[piece]]
