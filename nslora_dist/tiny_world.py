"""The demo's world: invented people, two arithmetic skills, one new task, and a word-level tokenizer.

Everything is drawn from one integer seed, so the shipped files can be made again bit by bit. Three kinds of rows exist:

- facts: ``person × relation → one word``, said in several phrasings; what the base must not forget;
- skills: sum and maximum of two two-digit numbers; the other thing it must not forget;
- the task: the difference of two two-digit numbers, in words that the pre-training never uses. Its digits and its
  answer format do occur in pre-training: without them no low-rank adapter could learn it.

Numbers are written digit by digit, answers with the last digit first: a left-to-right model then meets each carry after
the digits that cause it.

All texts are words separated by single spaces and the tokenizer splits on nothing else, so tokenising a prompt and its
response apart and joining them equals tokenising the whole row.
"""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

Row = dict[str, str]

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
DIGITS = tuple("0123456789")

# relation -> (number of possible answers, suffix that marks the kind of word, phrasings). An answer is one word.
RELATIONS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "birthplace": (40, "ville", ("{name} was born in", "the birthplace of {name} is", "where was {name} born ?")),
    "employer": (40, "corp", ("{name} works for", "the employer of {name} is", "who employs {name} ?")),
    "studies": (30, "ology", ("{name} has studied", "the studies of {name} were in", "what did {name} study ?")),
    "language": (30, "ese", ("at home {name} speaks", "the language of {name} is", "what does {name} speak ?")),
    "instrument": (24, "ophone", ("{name} plays the", "the instrument of {name} is", "what does {name} play ?")),
    "residence": (40, "stead", ("{name} lives in", "the home of {name} is", "where does {name} live ?")),
}
SKILLS: dict[str, tuple[Callable[[int, int], int], str]] = {
    "sum": (lambda a, b: a + b, "sum of {a} and {b} is"),
    "maximum": (max, "maximum of {a} and {b} is"),
}
# No word of the task but the digits occurs in the pre-training text.
TASK = "difference"
TASK_PHRASING = "difference between {a} , {b} equals"

_ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kl", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u")


@dataclass(frozen=True)
class World:
    """All rows of one seed.

    Attributes:
        facts: Relation triples ``(name, relation, answer)``, one per fact.
        vocabulary: Every word the tokenizer knows, special tokens first.
        pretraining: Rows by kind (``facts``, ``sum``, ``maximum``); a fact appears once per phrasing.
        task_train: Rows of the new task to train on.
        task_test: Rows of the new task to test on, no pair of numbers shared with ``task_train``.
        retention: Evaluation rows by kind. A fact is asked once, in a drawn phrasing; the pairs of numbers of a skill
            are absent from its pre-training rows, so what is measured is the skill and not a table learnt by heart.
        calibration: Texts by source (``facts``, ``arithmetic``).
        probes: Texts by probe (``sum``, ``maximum``, ``facts_unseen``: statements about people whom no calibration
            text names).
    """

    facts: tuple[tuple[str, str, str], ...]
    vocabulary: tuple[str, ...]
    pretraining: dict[str, list[Row]]
    task_train: list[Row]
    task_test: list[Row]
    retention: dict[str, list[Row]]
    calibration: dict[str, list[str]]
    probes: dict[str, list[str]]


def spell(number: int) -> str:
    """Writes a number digit by digit: ``47 -> "4 7"``."""
    return " ".join(str(number))


def spell_reversed(number: int) -> str:
    """Writes a number digit by digit, last digit first: ``47 -> "7 4"``."""
    return " ".join(reversed(str(number)))


def text_of(row: Row) -> str:
    """Joins a row's prompt and response into the sentence the base was trained on."""
    return f"{row['prompt']} {row['response']}"


def make_world(
    seed: int = 0,
    *,
    people: int = 100,
    task_train_rows: int = 3000,
    task_test_rows: int = 256,
    skill_test_rows: int = 256,
    calibration_rows: int = 256,
    probe_rows: int = 128,
) -> World:
    """Draws a world.

    Args:
        seed: Seed of every draw.
        people: Number of invented people; each has one fact per relation.
        task_train_rows: Training rows of the task.
        task_test_rows: Test rows of the task.
        skill_test_rows: Retention rows of each skill, held out of pre-training.
        calibration_rows: Texts of each calibration source.
        probe_rows: Texts of each probe.

    Returns:
        The world; equal arguments give equal worlds.

    Raises:
        ValueError: If more people, rows or texts are asked for than the world holds.
    """
    if not 1 <= people <= 24 * 24:
        raise ValueError(f"people={people}: the 24 first and 24 last names make between 1 and 576 of them")
    rng = random.Random(seed)
    taken: set[str] = set()
    first_names = _invent_words(rng, 24, suffix="", taken=taken)
    last_names = _invent_words(rng, 24, suffix="son", taken=taken)
    answers = {
        name: _invent_words(rng, count, suffix=suffix, taken=taken) for name, (count, suffix, _) in RELATIONS.items()
    }
    # First and last names are shared between people: a fact can only be recalled by reading both.
    names = rng.sample([f"{first} {last}" for first in first_names for last in last_names], people)
    facts = tuple((name, relation, rng.choice(answers[relation])) for name in names for relation in RELATIONS)

    pretraining = {"facts": [row for fact in facts for row in fact_rows(fact)]}
    retention = {"facts": [rng.choice(fact_rows(fact)) for fact in facts]}
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    for skill, (operation, phrasing) in SKILLS.items():
        rows = [number_row(phrasing, a, b, operation(a, b)) for a, b in draw(rng, pairs, len(pairs), what=skill)]
        retention[skill], pretraining[skill] = split(rows, skill_test_rows, what=f"skill_test_rows of {skill}")

    # The larger number stands first: the new skill is then one operation and not three (compare, swap, subtract).
    ordered = [(a, b) for a, b in pairs if a >= b]
    drawn = draw(rng, ordered, task_train_rows + task_test_rows, what="task_train_rows + task_test_rows")
    task_rows = [number_row(TASK_PHRASING, a, b, a - b) for a, b in drawn]
    task_test, task_train = split(task_rows, task_test_rows, what="task_test_rows")

    # Half of the people are never named in calibration: the probe shows if what is kept reaches beyond.
    half = set(names[: people // 2])
    seen = [text_of(row) for fact in facts if fact[0] in half for row in fact_rows(fact)]
    unseen = [text_of(row) for fact in facts if fact[0] not in half for row in fact_rows(fact)]
    skill_texts = {skill: [text_of(row) for row in pretraining[skill]] for skill in SKILLS}
    shares = {"sum": calibration_rows - calibration_rows // 2, "maximum": calibration_rows // 2}
    arithmetic = [text for skill in SKILLS for text in draw(rng, skill_texts[skill], shares[skill], what=skill)]
    rng.shuffle(arithmetic)
    calibration = {
        "facts": draw(rng, seen, calibration_rows, what="calibration_rows of facts"),
        "arithmetic": arithmetic,
    }
    probes = {skill: draw(rng, skill_texts[skill], probe_rows, what=f"probe_rows of {skill}") for skill in SKILLS}
    probes["facts_unseen"] = draw(rng, unseen, probe_rows, what="probe_rows of facts")

    words = {word for rows in pretraining.values() for row in rows for word in text_of(row).split(" ")}
    words |= set(TASK_PHRASING.format(a="", b="").split())
    # Answers nobody drew stay in the vocabulary, so its size does not depend on the seed.
    words |= {word for group in (first_names, last_names, *answers.values()) for word in group}
    vocabulary = (*SPECIAL_TOKENS, *DIGITS, *sorted(words - set(DIGITS)))
    return World(facts, vocabulary, pretraining, task_train, task_test, retention, calibration, probes)


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Builds the word-level tokenizer: one token per word, every digit its own, ``<bos>`` put in front."""
    ids = {word: index for index, word in enumerate(world.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As LLaMA's: special tokens add <bos> alone; <eos> is the trainer's to add after a response.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=256,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def data_files(world: World) -> dict[str, list[Row]]:
    """Lists what `write_data` writes: file name to its JSON rows."""
    files = {f"{TASK}_train.jsonl": world.task_train, f"{TASK}_test.jsonl": world.task_test}
    files |= {f"retention_{kind}.jsonl": rows for kind, rows in world.retention.items()}
    files |= {f"calibration_{source}.jsonl": _as_texts(texts) for source, texts in world.calibration.items()}
    return files | {f"probe_{probe}.jsonl": _as_texts(texts) for probe, texts in world.probes.items()}


def to_jsonl(rows: Iterable[Row]) -> str:
    """Serialises rows, one JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_data(world: World, folder: str | Path) -> list[Path]:
    """Writes every data file of a world.

    Args:
        world: The world to write.
        folder: Where to; made if it is missing. Files of the same names are replaced.

    Returns:
        The paths written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in data_files(world).items():
        paths.append(folder / name)
        paths[-1].write_text(to_jsonl(rows), encoding="utf-8")
    return paths


def _invent_words(rng: random.Random, count: int, *, suffix: str, taken: set[str]) -> list[str]:
    """Draws `count` new words of two syllables and a suffix; adds them to `taken`."""
    words: list[str] = []
    while len(words) < count:
        syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2)]
        # Capitals set the invented words apart from those of the phrasings.
        word = "".join(syllables).capitalize() + suffix
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


def fact_rows(fact: tuple[str, str, str]) -> list[Row]:
    """Says a fact in each of its relation's phrasings."""
    name, relation, answer = fact
    return [{"prompt": phrasing.format(name=name), "response": answer} for phrasing in RELATIONS[relation][2]]


def number_row(phrasing: str, a: int, b: int, result: int) -> Row:
    """Asks for a result in words and digits."""
    return {"prompt": phrasing.format(a=spell(a), b=spell(b)), "response": spell_reversed(result)}


def draw(rng: random.Random, pool: list, count: int, *, what: str) -> list:
    """Draws `count` different items, or says which argument asked for too many."""
    if not 0 <= count <= len(pool):
        raise ValueError(f"{what}: {count} rows asked for, this world holds {len(pool)}; ask for fewer")
    return rng.sample(pool, count)


def split(rows: list[Row], first: int, *, what: str) -> tuple[list[Row], list[Row]]:
    """Splits rows in the first `first` and the others, neither empty."""
    if not 1 <= first < len(rows):
        raise ValueError(f"{what}={first}: must be at least 1 and below {len(rows)}")
    return rows[:first], rows[first:]


def _as_texts(texts: list[str]) -> list[Row]:
    return [{"text": text} for text in texts]
