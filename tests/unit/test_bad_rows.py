"""Rows that cannot be used: found with their line, refused or left out as the recipe says, and counted."""

import json
import random
import tempfile
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_calibration import section
from test_data_tools import bpe, data_section, llama_sentencepiece, offline, train_section, write_jsonl

from nslora_dist import json_rows
from nslora_dist.bad_rows import RowCounts
from nslora_dist.calibration_data import calibration_texts
from nslora_dist.data import TrainingData
from nslora_dist.errors import StorageError, UserError
from nslora_dist.evaluate import EvaluationSets
from nslora_dist.recipe import EvaluationSection
from nslora_dist.recipe_data import PromptSet, Texts
from nslora_dist.rows import Rows, load_rows

__all__ = ["offline"]  # a fixture for every test here

GOOD = b'{"prompt": "why", "response": "blue"}'
BAD = {
    "not_utf8": b'{"prompt": "why", "response": "caf\xe9"}',
    "not_json": b'{"prompt": "why", "response": ',
    "not_an_object": b'["why", "blue"]',
    "missing": b'{"prompt": "why"}',
    "null": b'{"prompt": null, "response": "blue"}',
    "not_text": b'{"prompt": "why", "response": {"text": "blue"}}',
    "empty_response": b'{"prompt": "why", "response": ""}',
}
SAID = {
    "not_utf8": "not UTF-8 (byte 0xE9 at position 34 of the line)",
    "not_json": "not JSON (expecting value at column 30)",
    "not_an_object": "a JSON list, not an object of fields",
    "missing": "field 'response' is missing",
    "null": "field 'prompt' is null, not text",
    "not_text": "field 'response' is dict {'text': 'blue'}, not text",
    "empty_response": "field 'response' is empty, there is nothing to predict",
}
MORE_BAD = {
    "deep": (b"[" * 100_000, "not_json"),
    "a number of 5000 digits": (b'{"prompt": "why", "response": ' + b"1" * 5000 + b"}", "not_json"),
    "two objects": (GOOD + GOOD, "not_json"),
    "half a surrogate pair": (b'{"prompt": "why", "response": "\\ud83d"}', "not_text"),
    "a date is text": (b'{"prompt": "why", "response": "2020-01-01"}', None),
    "text of a NUL": (b'{"prompt": "why", "response": "\\u0000"}', None),
    "NaN elsewhere": (b'{"prompt": "why", "response": "blue", "score": NaN}', None),
    "a mark inside": (b"\xef\xbb\xbf" + GOOD, None),
    "white space": (b" \t ", None),
}


def read(path: Path | str, policy: str = "error", **settings) -> Rows:
    chosen = PromptSet(path=str(path), on_bad_row=policy, **settings)
    return load_rows(chosen, ["prompt", "response"], name="data", filled=["response"])


def said(path: Path | str, policy: str = "error", **settings) -> str:
    with pytest.raises(UserError) as caught:
        read(path, policy, **settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def written(path: Path, *lines: bytes, end: bytes = b"\n") -> Path:
    path.write_bytes(end.join(lines))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
@pytest.mark.parametrize("reason", BAD)
def test_a_bad_line_is_named_with_the_remedy(tmp_path: Path, name: str, reason: str) -> None:
    path = written(tmp_path / name, GOOD, b"", GOOD, BAD[reason], GOOD, BAD["null"])
    assert said(path) == (
        f"data.path {path}: line 4 (the first is 1): {SAID[reason]}; "
        "mend or remove that line, or set data.on_bad_row=skip to leave such rows out"
    )


def test_bad_lines_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [line for bad in BAD.values() for line in (bad, GOOD)]
    path = written(tmp_path / "a.jsonl", *lines, BAD["null"], end=b"\r\n")
    data = TrainingData.load(data_section(str(path), on_bad_row="skip"), train_section(), bpe())
    assert data.samples == len(BAD)
    assert [data.place(i) for i in (0, 3)] == ["line 2 (the first is 1)", "line 8 (the first is 1)"]
    assert data.bad_rows == {reason: 1 + (reason == "null") for reason in BAD}
    assert data.counts.rows == len(lines) + 1
    warnings = [record.message for record in caplog.records if "left out" in record.message]
    reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in data.bad_rows.items())
    assert warnings == [f"data.path {path}: left out 8 bad rows ({reasons}): lines 1, 3, 5, 7, 9, ... (the first is 1)"]
    alone = written(tmp_path / "good.jsonl", *[GOOD] * len(BAD))
    assert data.hash == TrainingData.load(data_section(str(alone)), train_section(), bpe()).hash


@pytest.mark.parametrize("case", MORE_BAD)
def test_lines_that_only_look_good_or_bad(tmp_path: Path, case: str) -> None:
    line, reason = MORE_BAD[case]
    path = written(tmp_path / "a.jsonl", GOOD, line, GOOD)
    rows = read(path, "skip")
    assert dict(rows.tally.counts) == ({} if reason is None else {reason: 1})
    assert len(rows) == 2 + (reason is None and not line.isspace())
    if reason is None:
        assert len(read(path)) == len(rows)
    else:
        assert "line 2 (the first is 1): " in said(path)


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_nothing_left_is_an_error(tmp_path: Path, policy: str) -> None:
    path = written(tmp_path / "a.jsonl", *BAD.values())
    if policy == "skip":
        assert "no usable row is left, of 7: 7 bad rows (1 not utf8, 1 not json" in said(path, policy)
    assert said(written(path, b"\n \n"), policy).endswith("has no rows; give a file or split that has some")


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_wrong_field_name_is_no_bad_row(tmp_path: Path, policy: str) -> None:
    path = written(tmp_path / "a.jsonl", GOOD, GOOD)
    chosen = PromptSet(path=str(path), on_bad_row=policy)
    with pytest.raises(UserError) as caught:
        load_rows(chosen, ["prompt", "reponse"], name="data")
    message = str(caught.value)
    assert message.endswith("no field 'reponse' (did you mean 'response'?); its fields are prompt, response")


def test_the_first_row_may_lack_a_field_that_others_have(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", BAD["missing"], GOOD)
    assert "line 1 (the first is 1): field 'response' is missing; mend" in said(path)
    assert len(read(path, "skip")) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_other_encodings_of_a_whole_file(tmp_path: Path, encoding: str, policy: str) -> None:
    for name, text in (("a.jsonl", GOOD.decode()), ("a.json", f"[{GOOD.decode()}]")):
        path = tmp_path / name
        path.write_bytes(f"{text}\n".encode(encoding))
        assert said(path, policy) == (f"data.path {path}: looks like UTF-{encoding[4:6]}; convert the file to UTF-8")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_fault(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, b"\xef\xbb\xbf" + GOOD, GOOD)
    assert len(read(path)) == 2
    written(path, b"\xef\xbb\xbf[" + GOOD + b"]")
    assert len(read(tmp_path / "a.json")) == 1 if name == "a.json" else "not an object" in said(path)


def test_arrays_have_the_same_policy(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": 3}, 7, {"prompt": None, "response": "b"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=1))
    assert "row 1 (the first is 0): field 'response' is int 3, not text; mend or remove that row, or" in said(path)
    kept = read(path, "skip")
    assert dict(kept.tally.counts) == {"not_text": 1, "not_an_object": 1, "null": 1} and len(kept) == 1
    path.write_text(json.dumps(rows)[:-5])
    for policy in ("error", "skip"):
        assert "cannot be read as a JSON array: " in said(path, policy)
    path.write_bytes(b'["\xe9"]')
    assert said(path).endswith("not UTF-8 (byte 2 of the file); convert the file to UTF-8")


def test_columns_have_the_same_policy(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"prompt": "a", "response": r} for r in ("b", None, "", "c", "d")]
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert "row 1 (the first is 0): field 'response' is missing or null, not text; mend" in said(path)
    kept = read(path, "skip")
    assert [row["response"] for row in kept] == ["b", "c", "d"] and list(kept.numbers) == [0, 3, 4]
    assert dict(kept.tally.counts) == {"null": 1, "empty_response": 1} and kept.read == 5
    kept = read(path, "skip", samples=2)  # what stands past the second usable row is not judged
    assert [row["response"] for row in kept] == ["b", "c"] and kept.read == 4
    assert len(read(path, samples=1)) == 1
    datasets.Dataset.from_list([{"prompt": "a", "response": i} for i in range(3)]).to_parquet(path)
    assert "no usable row is left, of 3: 3 bad rows (3 not text): rows 0, 1, 2 (the first is 0)" in said(path, "skip")
    datasets.Dataset.from_list([{"prompt": "a", "response": ["b"]}]).to_parquet(path)
    assert "row 0 (the first is 0): field 'response' is List, not text" in said(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    written(folder / "train.jsonl", GOOD, BAD["not_utf8"], BAD["null"])
    kept = read(folder, "skip")
    assert dict(kept.tally.counts) == {"not_utf8": 1, "null": 1} and len(kept) == 1
    assert "row 1 (the first is 0): field 'response' is not UTF-8" in said(folder)
    written(folder / "train.jsonl", GOOD, BAD["not_json"])
    assert "name one file, to be told the line" in said(folder, "skip")


def test_slices_count_every_row_and_judge_only_their_own(tmp_path: Path) -> None:
    texts = ["0", "1", None, "3", "4", "5", "6", "7", "8", "9"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])

    def chosen(split: str, policy: str = "skip") -> list[str]:
        rows = load_rows(Texts(path=path, split=split, on_bad_row=policy), ["text"], name="data")
        assert [int(text) + 1 for row in rows for text in row.values()] == list(rows.numbers)
        return [row["text"] for row in rows]

    assert chosen("train[1:4]") == ["1", "3"]
    assert chosen("train[-2:]") == ["8", "9"]
    assert chosen("train[50%:70%]", "error") == ["5", "6"]
    assert chosen("train[8:]+train[:4]") == ["8", "9", "0", "1", "3"]
    assert chosen("train[3:6]+train[4:7]") == ["3", "4", "5", "4", "5", "6"]
    with pytest.raises(UserError, match="line 3 "):
        chosen("train[1:4]", "error")
    for split in ("train[:", "train[5:99%", "train+test", "train[:200%]", "train[a:]"):
        with pytest.raises(UserError, match=r"^data\.split '"):
            chosen(split)


def test_samples_are_usable_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "a.jsonl", GOOD, BAD["null"], GOOD, GOOD, BAD["not_json"])
    assert list(read(path, "skip", samples=2).numbers) == [1, 3]
    assert read(path, "skip", samples=2).tally.counts.total() == 1
    assert len(read(path, samples=1)) == 1 and not caplog.text
    assert list(read(path, "skip", samples=9).numbers) == [1, 3, 4]
    assert "9 rows asked for (samples), 3 there" in caplog.text


def test_a_line_past_the_longest_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "LONGEST_LINE", 64)
    long = b'{"prompt": "why", "response": "' + b"b" * 200 + b'"}'
    path = written(tmp_path / "a.jsonl", GOOD, long, GOOD)
    assert "line 2 (the first is 1): the line is longer than 64 bytes" in said(path)
    rows = read(path, "skip")
    assert list(rows.numbers) == [1, 3] and dict(rows.tally.counts) == {"line_too_long": 1}


def test_many_rows_are_mapped_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2500
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"é{i}", "response": "b"} for i in range(count)])
    held = list(read(path))
    monkeypatch.setattr(json_rows, "IN_MEMORY", 1000)
    mapped = read(path)
    assert list(mapped) == held and len(held) == count
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    assert cache.is_dir() and not list(cache.iterdir())  # the file has no name: a killed run leaves none behind
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "a.jsonl" / "below a file")
    with pytest.raises(StorageError, match="make room, or name another folder with HF_DATASETS_CACHE"):
        read(path)


def test_texts_come_in_chunks_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nslora_dist.rows._CHUNK_SIZE", 100)
    sizes = [10, 20, 300, 5, 5, 90, 1]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * size} for size in sizes])
    rows = load_rows(Texts(path=path), ["text"], name="data")
    order = rows.numbers[::-1] - 1
    chunks = [[len(text) for text in texts["text"]] for _, texts in rows.chunks(order, rows=3)]
    assert chunks == [[1, 90, 5], [5], [300], [20, 10]]


def test_calibration_and_evaluation_have_their_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "t.jsonl", *(b'{"text": "%s"}' % t for t in (b"lamp", b"blue", b"lamp")), b"{", b"7")
    plain = section(str(path), {"p": str(path)})
    with pytest.raises(
        UserError, match=r"^calibration\.sources\.a\.path .*line 4 .*calibration\.sources\.a\.on_bad_row"
    ):
        calibration_texts(plain, llama_sentencepiece())
    tree = plain.model_dump()
    tree["sources"]["a"]["on_bad_row"] = tree["probes"]["p"]["on_bad_row"] = "skip"
    for found in calibration_texts(type(plain).model_validate(tree), llama_sentencepiece()):
        assert found.counts == RowCounts(5, {"not_json": 1, "not_an_object": 1}, duplicates=1)
        assert len(found.calibration) == 3
    assert "calibration.sources.a: 1 of 3 rows have exactly the tokens of an earlier row" in caplog.text

    long = b'{"prompt": "why", "response": "' + b"blue " * 400 + b'"}'
    path = written(tmp_path / "e.jsonl", GOOD, GOOD, BAD["null"], long)
    tree = {"adaptation": {"path": str(path), "on_bad_row": "skip"}, "max_length": 300}
    tree["retention"] = {"old": {"path": str(path), "samples": 1}}
    sets = EvaluationSets.load(EvaluationSection.model_validate(tree), bpe())
    assert sets.counts == {
        "adaptation": RowCounts(4, {"null": 1}, duplicates=1, too_long=1, left_out=1),
        "retention.old": RowCounts(1),
    }
    counts = {"rows": 4, "bad_rows": 1, "bad_rows_null": 1, "duplicates": 1, "too_long": 1, "left_out": 1}
    assert sets.counts["adaptation"].facts() == counts
    caplog.clear()
    roomy = EvaluationSection.model_validate(tree | {"max_length": 8192})
    assert EvaluationSets.load(roomy, bpe()).counts["adaptation"].left_out == 0
    assert EvaluationSets.load(roomy, bpe(), context=300).counts == sets.counts
    assert "evaluation.adaptation: 1 of 3 rows are longer than 300 tokens: 0 cut at the end, 1 left out" in caplog.text


def test_duplicates_are_counted_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "why", "response": "blue"}, {"prompt": "why ", "response": "blue"}]
    rows += [{"prompt": "why", "response": "blue", "other": 1}, {"prompt": "", "response": "why blue"}, rows[0]]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = TrainingData.load(data_section(path), train_section(), bpe())
    assert (data.samples, data.duplicates, data.bad_rows) == (5, 2, {})
    said = [r.message for r in caplog.records if "earlier row" in r.message]
    assert said == ["data: 2 of 5 rows have exactly the tokens of an earlier row; they are kept"]
    caplog.clear()
    path = write_jsonl(tmp_path / "b.jsonl", rows[:2])
    assert TrainingData.load(data_section(path), train_section(), bpe()).duplicates == 0 and not caplog.text


def test_the_border_between_prompt_and_response_makes_a_difference(tmp_path: Path) -> None:
    tokenizer = bpe()
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "w", "response": "xy"}, {"prompt": "wx", "response": "y"}])
    data = TrainingData.load(data_section(path), train_section(), tokenizer)
    first, second = (data._samples.ids(i).tolist() for i in (0, 1))
    assert first == second and data.duplicates == 0


def test_a_response_of_no_tokens_has_the_same_policy(tmp_path: Path) -> None:
    from tokenizers import normalizers

    tokenizer = bpe()
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "why", "response": r} for r in (" ", "blue", "  ")])
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    try:
        with pytest.raises(UserError, match=r"line 1 \(the first is 1\): field 'response' is empty"):
            TrainingData.load(data_section(path), train_section(), tokenizer)
        data = TrainingData.load(data_section(path, on_bad_row="skip"), train_section(), tokenizer)
        assert (data.samples, data.bad_rows) == (1, {"empty_response": 2})
        with pytest.raises(UserError, match="no usable row is left: 1 bad row "):
            TrainingData.load(data_section(path, on_bad_row="skip", samples=1), train_section(), tokenizer)
    finally:
        tokenizer.backend_tokenizer.normalizer = None


ROWS = [{"prompt": f"why {i} é", "response": "blue \U0001f600" * (i % 3 + 1), "n": i} for i in range(6)]
CHANGES = st.lists(
    st.tuples(st.sampled_from(["flip", "insert", "remove"]), st.integers(0, 10_000), st.integers(0, 255)), max_size=12
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES, suffix=st.sampled_from([".jsonl", ".json"]))
def test_any_damage_gives_rows_or_one_clear_error(changes: list[tuple[str, int, int]], suffix: str) -> None:
    raw = bytearray("".join(json.dumps(row, ensure_ascii=row["n"] % 2 == 0) + "\n" for row in ROWS).encode())
    for kind, at, value in changes:
        at %= len(raw)
        if kind == "flip":
            raw[at] ^= value or 1
        elif kind == "insert":
            raw.insert(at, value)
        else:
            del raw[at : at + 1 + value % 40]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(raw)
        found: dict[str, Rows | str] = {}
        for policy in ("error", "skip"):
            try:
                found[policy] = read(path, policy)
            except UserError as error:
                assert "\n" not in str(error)
                found[policy] = str(error)
        whole, left = found["error"], found["skip"]
        if isinstance(whole, Rows):
            assert isinstance(left, Rows) and list(left) == list(whole) and not left.tally.counts
        elif isinstance(left, Rows):
            lines = bytes(raw).split(b"\n")
            first = min(
                set(range(1, len(lines) + 1)) - set(left.numbers) - {n for n, t in enumerate(lines, 1) if not t.strip()}
            )
            assert f"line {first} (the first is 1)" in whole
            for number, row in zip(left.numbers, left, strict=True):
                told = json.loads(lines[number - 1].decode("utf-8-sig"))
                assert row == {key: told[key] for key in ("prompt", "response")}


def test_the_damage_is_of_every_kind() -> None:
    """What the generated damage above comes to: a sample of it gives rows and errors under either policy."""
    dice = random.Random(0)
    seen = set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        for _ in range(60):
            raw = bytearray("".join(json.dumps(row) + "\n" for row in ROWS).encode())
            raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
            path.write_bytes(raw)
            try:
                seen |= set(read(path, "skip").tally.counts) or {"good"}
            except UserError:
                seen.add("error")
    assert {"good", "not_utf8", "not_json", "missing"} <= seen
