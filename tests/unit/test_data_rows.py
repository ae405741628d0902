"""Reading rows and tokenizers: formats, and what a person is told when something is wrong."""

import json
import socket
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import transformers
from test_data_tools import bpe, llama_sentencepiece, offline, write_jsonl

from nslora_dist import dist
from nslora_dist.errors import UserError
from nslora_dist.recipe import BaseModelSection
from nslora_dist.recipe_data import PromptSet, Texts
from nslora_dist.rows import from_rank0, load_rows, load_tokenizer

__all__ = ["offline"]  # a fixture for every test here

ROWS = [{"prompt": f"p{i}", "response": f"r {i}", "more": i} for i in range(5)]


def message(section: Texts | PromptSet, *fields: str) -> str:
    with pytest.raises(UserError) as caught:
        load_rows(section, fields or ("text",), name="data")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(tmp_path: Path) -> dict[str, str]:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "folder" / "test.jsonl", ROWS[:2])
    return {name: str(tmp_path / name) for name in ("a.jsonl", "a.json", "a.parquet", "folder")}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "folder"])
def test_local_formats(tmp_path: Path, name: str) -> None:
    path = files(tmp_path)[name]
    rows = load_rows(PromptSet(path=path), ["response", "prompt"], name="data")
    assert list(rows) == [{"response": row["response"], "prompt": row["prompt"]} for row in ROWS]
    assert len(load_rows(PromptSet(path=path, samples=3), ["prompt"], name="data")) == 3
    assert len(load_rows(PromptSet(path=path, split="train[1:3]"), ["prompt"], name="data")) == 2
    # A folder has the splits its files name; a single file is whichever split is asked for.
    assert len(load_rows(PromptSet(path=path, split="test"), ["prompt"], name="data")) == (2 if name == "folder" else 5)


def test_local_paths_ask_nothing_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise OSError("no network")

    paths = files(tmp_path)
    tokenizers = [bpe().name_or_path, llama_sentencepiece().name_or_path]
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for path in paths.values():
        load_rows(Texts(path=path), ["prompt"], name="data")
    for folder in tokenizers:
        load_tokenizer(BaseModelSection(path=folder))
    assert not asked


def test_unknown_field_names_the_nearest_and_all(tmp_path: Path) -> None:
    said = message(PromptSet(path=files(tmp_path)["a.jsonl"]), "promt")
    assert said.endswith("no field 'promt' (did you mean 'prompt'?); its fields are prompt, response, more")


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ({"text": 3}, "int 3"),
        ({"text": None}, "null"),
        ({"other": "b"}, "missing"),
        ({"text": ["b"]}, "list"),
    ],
)
def test_a_row_that_is_not_text_is_named(tmp_path: Path, bad: dict, found: str) -> None:
    rows = [{"text": "a"}, {"text": "b"}, bad, {"text": "c"}, bad]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    said = message(Texts(path=path))
    assert said.startswith(f"data.path {path}: line 3 (the first is 1): field 'text' is {found}")
    datasets.Dataset.from_list([{"text": 1}]).to_parquet(tmp_path / "a.parquet")
    assert "row 0 (the first is 0): field 'text' is int 1" in message(Texts(path=str(tmp_path / "a.parquet")))


def test_rows_past_samples_are_not_judged(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": None}])
    assert len(load_rows(PromptSet(path=path, samples=2), ["prompt"], name="data")) == 2
    assert "line 3 " in message(PromptSet(path=path), "prompt")


def test_missing_paths_and_unreachable_hub_names(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none.jsonl"), "data/none.parquet", "./none", "a/b/c"):
        assert message(Texts(path=path)).startswith(f"data.path {path}: no such file or folder")
    for path in ("nobody/nothing", "nothing"):
        said = message(Texts(path=path))
        assert said.startswith(f"data.path {path}: no local file of that name, and no hub dataset could be read (")
        assert said.endswith("mend the path or the network")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    def written(name: str, text: str) -> Texts:
        (tmp_path / name).write_text(text)
        return Texts(path=str(tmp_path / name))

    assert "the file is empty" in message(written("empty.jsonl", ""))
    assert "has no rows" in message(written("none.json", "[]"))
    assert "line 2 (the first is 1): not JSON" in message(written("broken.jsonl", '{"text": "a"}\n{"text": \n'))
    assert "cannot be read as parquet" in message(written("not.parquet", "text"))
    assert "files of kind '.csv' are not read; use .json, .jsonl" in message(written("a.csv", "text\na\n"))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}\n'.encode("latin-1"))
    assert "line 1 (the first is 1): not UTF-8 (byte 0xE9 at " in message(Texts(path=str(tmp_path / "latin.jsonl")))
    good = written("a.jsonl", '{"text": "a"}\n').path
    assert message(Texts(path=good, subset="main")).startswith("data.subset main: ")
    assert message(Texts(path=good, split="train[:0]")).endswith("give a file or split that has some")
    assert message(Texts(path=good, split="train[:")).startswith("data.split 'train[:'")
    folder = files(tmp_path)["folder"]
    assert message(Texts(path=folder, split="dev")).startswith("data.split 'dev'")
    assert message(Texts(path=folder, subset="zz"))
    datasets.load_dataset("json", data_files=good, split="train").save_to_disk(tmp_path / "saved")
    assert "is a folder of save_to_disk; write its split with to_parquet" in message(
        Texts(path=str(tmp_path / "saved"))
    )
    (tmp_path / "void").mkdir()
    assert "cannot be read as a folder of data files" in message(Texts(path=str(tmp_path / "void")))


def test_tokenizer_errors(tmp_path: Path) -> None:
    def said(path: str) -> str:
        with pytest.raises(UserError) as caught:
            load_tokenizer(BaseModelSection(path=path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert said(str(tmp_path / "none")).endswith("no such folder; give a local model folder or a hub name")
    assert said("nobody/nothing").startswith("base_model.path nobody/nothing: no tokenizer could be loaded (")
    assert said(str(tmp_path)).startswith(f"base_model.path {tmp_path}: no tokenizer could be loaded (")
    transformers.Qwen2Config(vocab_size=50).save_pretrained(
        tmp_path / "config_alone"
    )  # of which transformers makes an empty one
    assert ": no tokenizer is there, or one that knows no token but special ones" in said(
        str(tmp_path / "config_alone")
    )
    bpe().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings = {k: v for k, v in settings.items() if k not in ("eos_token", "pad_token")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "no end-of-sequence token" in said(str(tmp_path))


def test_tokenizer_pads_with_eos_where_it_has_nothing_else() -> None:
    assert bpe().pad_token_id == bpe().eos_token_id == 1


def test_other_ranks_do_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_main", lambda: False)
    monkeypatch.setattr(dist, "share", lambda value: "rank 0's" if value is None else value)
    assert from_rank0(lambda: pytest.fail("read on another rank")) == "rank 0's"
