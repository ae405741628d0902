"""Calibration texts: which tokens become which sequences, held-out shares, and who accumulates what."""

import json
import random
from pathlib import Path

import pytest
import torch
from test_data_tools import TOKENIZERS, llama_sentencepiece, offline, sentence, write_jsonl

from nslora_dist.calibration_data import CalibrationTexts, calibration_texts, text_batches
from nslora_dist.errors import UserError
from nslora_dist.recipe_data import CalibrationSection

__all__ = ["offline"]  # a fixture for every test here

SP = llama_sentencepiece


def section(path: str | dict[str, str], probes: dict[str, str] | None = None, **settings) -> CalibrationSection:
    paths = {"a": path} if isinstance(path, str) else path
    tree = {"sources": {name: {"path": p} for name, p in paths.items()}}
    tree["probes"] = {name: {"path": p} for name, p in (probes or {}).items()}
    return CalibrationSection.model_validate({**tree, "sequence_length": 6, "heldout_fraction": 0.0, **settings})


def write_texts(path: Path, texts: list[str]) -> str:
    return write_jsonl(path, [{"text": text} for text in texts])


def ids(sequences: list[torch.Tensor]) -> list[list[int]]:
    return sorted(s.tolist() for s in sequences)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_rows_of_full_length_get_no_special_token(tmp_path: Path, name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    texts = ["lamp lamp lamp lamp lamp lamp", "blue " * 9 + "blue", "river green", "stone", ""]
    plain = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    length = len(plain[0])
    path = write_texts(tmp_path / "a.jsonl", texts)
    (found,) = calibration_texts(section(path, sequence_length=length), tokenizer)
    short = [tokenizer(text).input_ids for text in texts[2:4]]
    assert short[1][0] == tokenizer.bos_token_id and all(len(s) <= length for s in short)
    assert ids(found.calibration) == sorted([plain[0], plain[1][:length], *short])
    assert found.truncated == 1 and found.heldout == [] and found.weight == 1.0
    assert all(s.dtype == torch.int64 for s in found.calibration)


def test_special_tokens_never_make_a_row_too_long(tmp_path: Path) -> None:
    tokenizer = SP()
    path = write_texts(tmp_path / "a.jsonl", ["lamp lamp lamp lamp lamp"])
    (found,) = calibration_texts(section(path), tokenizer)
    assert ids(found.calibration) == [tokenizer("lamp lamp lamp lamp lamp").input_ids]
    kept = tokenizer.add_eos_token
    try:
        tokenizer.add_eos_token = True
        tokenizer.update_post_processor()
        (found,) = calibration_texts(section(path), tokenizer)
        assert len(tokenizer("lamp lamp lamp lamp lamp").input_ids) == 7
        assert ids(found.calibration) == [tokenizer("lamp lamp lamp lamp lamp").input_ids[:6]] and not found.truncated
    finally:
        tokenizer.add_eos_token = kept
        tokenizer.update_post_processor()


def test_samples_are_drawn_by_seed(tmp_path: Path, caplog) -> None:
    rng = random.Random(0)
    path = write_texts(tmp_path / "a.jsonl", [sentence(rng, 4) for _ in range(50)])

    def drawn(**settings) -> CalibrationTexts:
        return calibration_texts(section(path, **settings), SP())[0]

    some = drawn(samples=10)
    assert len(some.calibration) == 10 and not caplog.text
    assert some.hash == drawn(samples=10).hash
    assert some.hash != drawn(samples=10, seed=1).hash
    assert [s.tolist() for s in some.calibration] == [s.tolist() for s in drawn(samples=20).calibration[:10]]
    assert len(drawn(samples=99).calibration) == 50
    assert "calibration.sources.a: 99 sequences asked for, its rows make 50" in caplog.text


@pytest.mark.parametrize(
    ("count", "fraction", "kept_back"),
    [(16, 0.125, 2), (20, 0.3, 6), (4, 0.01, 1), (3, 0.99, 2), (4, 0.0, 0), (1, 0.5, 0)],
)
def test_heldout_share_is_the_end_of_the_drawn_rows(
    tmp_path: Path, count: int, fraction: float, kept_back: int
) -> None:
    rng = random.Random(0)
    path = write_texts(tmp_path / "a.jsonl", [sentence(rng, 4) for _ in range(count)])
    (whole,) = calibration_texts(section(path), SP())
    source, probe = calibration_texts(section(path, probes={"p": path}, heldout_fraction=fraction), SP())
    assert len(source.heldout) == kept_back and len(source.calibration) == count - kept_back
    assert [s.tolist() for s in (*source.calibration, *source.heldout)] == [s.tolist() for s in whole.calibration]
    texts = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
    lines = [int(origin.split()[1]) for origin in source.origins]
    for line, sequence in zip(lines, (*source.calibration, *source.heldout), strict=True):
        plain = SP()(texts[line - 1], add_special_tokens=False).input_ids
        assert plain[:4] == sequence.tolist()[1:5] or plain[:6] == sequence.tolist()
    assert (whole.hash == source.hash) == (kept_back == 0)
    assert probe.weight is None and len(probe.calibration) == count and probe.heldout == []


def test_sources_come_before_probes_in_recipe_order(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", ["lamp", "blue"])
    found = calibration_texts(section({"z": path, "b": path}, probes={"y": path, "a": path}), SP())
    assert [(text.name, text.weight) for text in found] == [("z", 1.0), ("b", 1.0), ("y", None), ("a", None)]


def test_concatenate_joins_short_rows_into_full_sequences(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    tokenizer = SP()
    long = "river river river river river river river"
    path = write_texts(tmp_path / "a.jsonl", ["lamp", "blue stone", long, "green", "lamp lamp lamp", "blue"])
    (found,) = calibration_texts(section(path, concatenate=True), tokenizer)
    assert all(len(s) == 6 for s in found.calibration)
    own = tokenizer(long, add_special_tokens=False).input_ids[:6]
    joined = [s.tolist() for s in found.calibration if s.tolist() != own]
    # 3 + 4 + 3 + 5 + 3 tokens with <s> and </s>: three full sequences, nothing left over.
    assert len(joined) == 3 and len(found.calibration) == 4 and found.truncated == 1
    at = [s.tolist() for s in found.calibration].index(own)
    assert found.origins[at] == "line 3 (the first is 1)" and len(found.origins) == 4
    texts = tokenizer.decode([i for s in joined for i in s]).replace("<s>", " ").split("</s>")
    assert sorted(t.strip() for t in texts) == ["", "blue", "blue stone", "green", "lamp", "lamp lamp lamp"]
    assert len(calibration_texts(section(path, concatenate=True, samples=2), tokenizer)[0].calibration) == 2

    path = write_texts(tmp_path / "b.jsonl", ["lamp", "blue", "green"])
    (found,) = calibration_texts(section(path, concatenate=True, sequence_length=7), tokenizer)
    assert [len(s) for s in found.calibration] == [7]
    assert "the last 2 joined tokens make no full sequence and are left out" in caplog.text
    (found,) = calibration_texts(section(path, concatenate=True, sequence_length=20), tokenizer)
    assert [len(s) for s in found.calibration] == [9]


def test_rows_without_text_are_errors_naming_the_source(tmp_path: Path) -> None:
    good, blank = write_texts(tmp_path / "a.jsonl", ["lamp"]), write_texts(tmp_path / "b.jsonl", ["", ""])
    with pytest.raises(
        UserError, match=r"calibration\.sources\.b\.path .*b\.jsonl: field 'text' is empty in every row"
    ):
        calibration_texts(section({"a": good, "b": blank}), SP())
    number = write_jsonl(tmp_path / "c.jsonl", [{"text": "a"}, {"text": 2}])
    with pytest.raises(UserError, match=r"calibration\.probes\.p\.path .*c\.jsonl: line 2 .*field 'text' is int 2"):
        calibration_texts(section(good, probes={"p": number}), SP())
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(UserError, match=r"calibration\.sources\.a\.path .*d\.json: split 'train' has no rows"):
        calibration_texts(section(str(tmp_path / "d.json")), SP())


def test_text_batches_are_dealt_over_ranks() -> None:
    sequences = [torch.arange(1, n + 2) for n in (3, 1, 3, 4, 2)]
    for world_size in (1, 2, 4, 8):
        seen = []
        for rank in range(world_size):
            for batch in text_batches(sequences, batch_size=2, rank=rank, world_size=world_size):
                assert len(batch.input_ids) <= 2 and batch.position_ids is None and (batch.labels == -100).all()
                mask = batch.attention_mask
                real = torch.ones_like(batch.input_ids) if mask is None else mask
                assert mask is None or not bool(mask.all())
                assert batch.token_count == int(real.sum())
                seen += [row[keep.bool()].tolist() for row, keep in zip(batch.input_ids, real, strict=True)]
        assert sorted(seen) == sorted(s.tolist() for s in sequences)
    assert text_batches(sequences, batch_size=2, rank=7, world_size=8) == []
