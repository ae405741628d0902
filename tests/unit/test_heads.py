"""Texts far longer than could count: exactly the first tokens of the whole, without tokenising it."""

import random
from pathlib import Path
from typing import Any

import pytest
from test_data_calibration import section, write_texts
from test_data_tools import (
    TOKENIZERS,
    bpe,
    data_section,
    llama_sentencepiece,
    offline,
    sentence,
    train_section,
    write_jsonl,
)
from tokenizers import processors

from nslora_dist import heads
from nslora_dist.calibration_data import calibration_texts
from nslora_dist.data import TrainingData, evaluation_batches
from nslora_dist.heads import token_heads
from nslora_dist.recipe_data import PromptSet

__all__ = ["offline"]  # a fixture for every test here

_dice = random.Random(3)
LONG = {
    "words": sentence(_dice, 8000),
    "one word": "x" * 40_000,
    "one word of syllables": "".join(_dice.choices(["ri", "ver", "st", "one", "la", "mp"], k=15_000)),
    "spaces": " " * 40_000,
    "breaks": "\n" * 40_000,
    "digits": "".join(_dice.choices("0123456789", k=40_000)),
    "other scripts": "".join(_dice.choices("éλ中\U0001f600", k=20_000)),
    "special tokens": "<eos>" * 8000,
    "words and a wide gap": sentence(_dice, 300) + " " * 30_000 + sentence(_dice, 300),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", LONG)
def test_heads_are_those_of_the_whole(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, longest = TOKENIZERS[name](), 0
    original = heads.token_ids

    def counted(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return original(tokenizer, texts, special=special)

    monkeypatch.setattr(heads, "token_ids", counted)
    for count in (1, 50, 200):
        for special in (False, True):
            texts = ["lamp", LONG[text], "", LONG[text][1:]]
            whole = tokenizer(texts, add_special_tokens=special).input_ids
            found = token_heads(tokenizer, texts, count=count, special=special)
            assert [found[0], found[2]] == [whole[0], whole[2]]
            for i in (1, 3):
                assert found[i][:count] == whole[i][:count] and len(found[i]) in (count, len(whole[i]))
    if text == "words":
        assert longest < len(LONG[text]) / 2  # it was not tokenised whole


def whole_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text is long: everything is tokenised whole, as a reference."""
    monkeypatch.setattr(heads, "_PER_TOKEN", 10**9)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("packing", [False, True])
def test_training_rows_are_the_same(tmp_path: Path, name: str, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "why", "response": "blue"}]
    rows += [{"prompt": f"{i} why", "response": text} for i, text in enumerate(LONG.values())]
    rows += [{"prompt": text, "response": "blue"} for text in LONG.values()]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    section, train = data_section(path, max_length=64, packing=packing), train_section()
    cut = TrainingData.load(section, train, TOKENIZERS[name]())
    whole_lengths(monkeypatch)
    whole = TrainingData.load(section, train, TOKENIZERS[name]())
    assert cut.hash == whole.hash and cut.counts == whole.counts
    assert cut.samples == 1 + len(LONG) and cut.without_response == len(LONG)


def test_a_prompt_of_exactly_the_limit_is_left_out_with_any_special_tokens(tmp_path: Path) -> None:
    tokenizer = bpe()
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": LONG["words"], "response": "b"}, {"prompt": "why", "response": "b"}]
    )
    kept = tokenizer.backend_tokenizer.post_processor
    pairs = [(t, tokenizer.convert_tokens_to_ids(t)) for t in (tokenizer.bos_token, tokenizer.eos_token)]
    try:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=pairs
        )
        for limit in (5, 6, 7, 40):
            section = data_section(path, max_length=limit, template="<bos>{prompt}")
            data = TrainingData.load(section, train_section(), tokenizer)
            assert (data.samples, data.without_response) == (1, 1)
    finally:
        tokenizer.backend_tokenizer.post_processor = kept


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("concatenate", [False, True])
def test_calibration_texts_are_the_same(
    tmp_path: Path, name: str, concatenate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(0)
    path = write_texts(tmp_path / "a.jsonl", [*LONG.values(), *(sentence(dice, 9) for _ in range(20))])
    asked = section(path, sequence_length=48, concatenate=concatenate)
    (cut,) = calibration_texts(asked, TOKENIZERS[name]())
    whole_lengths(monkeypatch)
    (whole,) = calibration_texts(asked, TOKENIZERS[name]())
    assert cut.hash == whole.hash and cut.counts == whole.counts and cut.truncated >= len(LONG) - 2


def test_long_questions_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "why", "response": LONG["words"]}, {"prompt": LONG["words"], "response": "blue"}]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"prompt": "why", "response": "blue"}])
    batches = evaluation_batches(
        PromptSet(path=path), llama_sentencepiece(), batch_size=4, rank=0, world_size=1, max_length=32
    )
    assert sum(b.supervised_rows for b in batches) == 1
