"""Names stay names, links are not followed, nothing that comes with a model or a data set runs, secrets are masked."""

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.merge_world import recipe as merge_recipe
from helpers.world import make_base, make_recipe, make_texts
from nslora_dist import named
from nslora_dist.base_config import load_config
from nslora_dist.base_files import BaseFiles, locate
from nslora_dist.errors import UserError
from nslora_dist.export import Factors, write_adapter
from nslora_dist.live_calibration import calibrate
from nslora_dist.merging.model import load_merged
from nslora_dist.merging.tasks import read_tasks
from nslora_dist.recipe import BaseModelSection, Recipe
from nslora_dist.recipe_data import Texts
from nslora_dist.redact import MASK, redact, redact_all
from nslora_dist.report import write_report
from nslora_dist.rows import load_rows, load_tokenizer
from nslora_dist.run_folder import claim_folder
from nslora_dist.yaml_file import parse_yaml

BAD_NAMES = ["../x", "a/b", ".hidden", "..", "", "a\\b", "a b", "a\nb", "x" * 101]


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


@pytest.fixture
def canary(tmp_path: Path) -> Any:
    """A file that code from outside would make; it must not."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("model") / "base")


def recipe(folder: Path, **changes: Any) -> Recipe:
    return make_recipe(folder, folder / "base", folder / "run", **changes)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_becomes_a_path_is_plain(tmp_path: Path, name: str) -> None:
    whole = recipe(tmp_path).model_dump(mode="json")
    for where in ("name", "baselines", "sources", "probes"):
        tree = json.loads(json.dumps(whole))
        if where == "name":
            tree["name"] = name
        elif where == "baselines":
            tree["evaluation"]["baselines"] = {name: {}}
        else:
            tree["calibration"][where] = {name: {"path": "x"}}
        with pytest.raises(ValueError, match="becomes a file name"):
            Recipe.model_validate(yaml.safe_load(yaml.safe_dump(tree)) | {"output_dir": "x"})
    with pytest.raises(ValueError, match="becomes a file name"):
        merge_recipe(None, {name: tmp_path, "b": tmp_path}, tmp_path / "out")
    with pytest.raises(ValueError, match="becomes a file name"):
        merge_recipe(None, {"a": tmp_path, "b": tmp_path}, tmp_path, name=name)


def test_plain_names_are_taken(tmp_path: Path) -> None:
    for name in ("a", "lr_1e-3", "v1.2", "größe", "-x", "_x", "x" * 100):
        assert (
            recipe(tmp_path, name=name, evaluation={"baselines": {name: {"adapter": {"method": "lora"}}}}).name == name
        )


@pytest.mark.parametrize(
    "inside", ["adapter", ".adapter.partial", "tensorboard", "logs/rank-0.log", "recipe.yaml", "a/b/c"]
)
def test_a_run_folder_with_a_link_in_it_is_refused(tmp_path: Path, inside: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    made = recipe(tmp_path)
    claim_folder(made)
    link = tmp_path / "run" / inside
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    before = (tmp_path / "run" / "recipe.yaml").stat().st_mtime_ns if inside != "recipe.yaml" else None
    for target in (elsewhere, tmp_path / "nothing"):
        link.symlink_to(target)
        with pytest.raises(UserError, match=rf"{inside} in it is a symbolic link"):
            claim_folder(made)
        link.unlink()
    assert not list(elsewhere.iterdir()) and not (tmp_path / "nothing").exists()
    assert before is None or (tmp_path / "run" / "recipe.yaml").stat().st_mtime_ns == before


def test_the_run_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    claim_folder(recipe(tmp_path))
    claim_folder(recipe(tmp_path))
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["recipe.yaml"]
    (tmp_path / "disk" / "recipe.yaml").write_text("name: [")
    with pytest.raises(UserError, match=r"recipe\.yaml: not readable as YAML"):
        claim_folder(recipe(tmp_path))


def test_calibrate_does_not_write_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(UserError, match="exists already"):
        calibrate(torch.nn.Linear(2, 2), [torch.ones(1, 2)], rank=1, folder=tmp_path / "link")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("model_type", ["llama", "invented"])
def test_code_in_a_model_folder_is_never_run(
    base: Path, tmp_path: Path, canary: Path, model_type: str, monkeypatch: Any
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("somebody was asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (folder / "mine.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": auto}))
    section = BaseModelSection(path=str(folder))
    with pytest.raises(UserError, match="code of its own .auto_map.*never run"):
        load_config(section)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}, "tokenizer_class": "MineTokenizer"}
    tokenizer["chat_template"] = f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    try:
        load_tokenizer(section)
    except UserError as error:
        assert "no tokenizer could be loaded" in str(error)


def test_a_key_for_remote_code_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        recipe(tmp_path, base_model={"trust_remote_code": True})


def test_a_pickled_base_is_refused(base: Path, tmp_path: Path, canary: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(UserError, match="only safetensors are read"):
        BaseFiles(locate(BaseModelSection(path=str(folder))))
    for name, seed in (("a", 0), ("b", 1)):
        module = "bert.encoder.layer.0.attention.self.query"
        torch.manual_seed(seed)
        factors = {module: Factors(torch.randn(2, 64), torch.randn(64, 2))}
        more: Any = {"scale": 1.0, "base_model": "x", "revision": None, "target_modules": ["query"], "card": {}}
        write_adapter(tmp_path / name, factors, **more, task_type=None)
    # A model of another layout is loaded by transformers itself, which reads pickles where it is let.
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 67,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    made = merge_recipe(
        folder,
        {name: tmp_path / name for name in "ab"},
        tmp_path / "out",
        method="nsc",
        inputs={name: {"path": "x"} for name in "ab"},
        base_model={"task": "sequence_classification"},
    )
    with pytest.raises(UserError, match="cannot be loaded as sequence_classification.*no file named model.safetensors"):
        load_merged(
            made.base_model, read_tasks(made), granularity="block", initial=[1.0, 1.0], device=torch.device("cpu")
        )


@pytest.mark.parametrize("name", ["data.py", "rows.py", "train.pkl", "train.pickle", "train.pt", "data.bin"])
def test_code_and_pickles_among_data_are_never_run(tmp_path: Path, canary: Path, name: str, monkeypatch: Any) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
    (folder / name).write_bytes(code.encode() if name.endswith(".py") else pickle.dumps(Bomb(canary)))
    for path in (folder, folder / name):
        with pytest.raises(UserError):
            load_rows(Texts(path=str(path)), ["text"], name="data")
    monkeypatch.chdir(folder)
    for builder in ("pandas", "text", "json"):  # the library takes these for formats, and reads what lies around
        with pytest.raises(UserError, match="is a file format, not a dataset"):
            load_rows(Texts(path=builder), ["text"], name="data")


def test_a_name_that_could_mean_two_things_is_said(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="nslora_dist")
    named._say.cache_clear()
    make_texts(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert named.is_local("owner/name", key="base_model.path")
    assert "base_model.path owner/name: taken from this machine" in caplog.text and "./owner/name" in caplog.text
    caplog.clear()
    assert not named.is_local("owner/other", key="data.path")
    assert "data.path owner/other: taken as a name on the hub" in caplog.text and "./owner/other" in caplog.text
    caplog.clear()
    assert named.is_local("owner/name", key="base_model.path")  # once is enough
    assert named.is_local("./owner/other", key="k") and named.is_local("/owner/other", key="k")
    assert named.is_local("a.jsonl", key="k") and not named.is_local("meta-llama/Llama-3.1-8B", key="k")
    assert named.is_local(str(tmp_path / "owner/name"), key="k")
    assert not caplog.records


@pytest.mark.parametrize("path", ["./some/name", "../some/name", "/some/name"])
def test_a_local_path_never_goes_to_the_hub(tmp_path: Path, monkeypatch: Any, path: str) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    for where in ("base_files.snapshot_download", "base_config.AutoConfig.from_pretrained", "rows.load_dataset"):
        monkeypatch.setattr(f"nslora_dist.{where}", called)
    monkeypatch.setattr("nslora_dist.rows.AutoTokenizer.from_pretrained", called)
    section = BaseModelSection(path=path)
    for read in (locate, load_config, load_tokenizer, lambda s: load_rows(Texts(path=s.path), ["text"], name="data")):
        with pytest.raises(UserError, match="no such"):
            read(section)


def test_secrets_are_masked(monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", "value-of-the-token")
    monkeypatch.setenv("MY_PASSWORD", "value-of")  # a part of the other
    monkeypatch.setenv("my_api_key", "0123456789")
    monkeypatch.setenv("SHORT_SECRET", "abc")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "trueorfalse")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(Path.cwd()))
    assert redact("a value-of-the-token, value-of and 0123456789") == f"a {MASK}, {MASK} and {MASK}"
    kept = f"abc trueorfalse {Path.cwd()}/x shelf_{'a' * 30} https://x.org:80/y@z HF_TOKEN"
    assert redact(kept) == kept
    assert redact(f"hf_{'aB3' * 10}.") == f"{MASK}."
    assert redact("https://me:pass@x.org/a s3://k:s@b") == f"https://{MASK}@x.org/a s3://{MASK}@b"
    tree = {"a": ["0123456789", 1, None], "0123456789": ("x",)}
    assert redact_all(tree) == {"a": [MASK, 1, None], MASK: ["x"]}


def test_no_secret_gets_into_what_a_run_writes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret-of-mine")
    made = recipe(tmp_path, data={"path": "https://me:s3cret-of-mine@x.org/rows.jsonl"})
    claim_folder(made)
    claim_folder(made)  # and the folder is known again
    write_report(
        tmp_path / "run", {"recipe": made.model_dump(mode="json"), "adapter": "s3cret-of-mine", "losses": [1.0]}
    )
    module = "model.layers.0.self_attn.q_proj"
    write_adapter(
        tmp_path / "run" / "adapter",
        {module: Factors(torch.ones(1, 2), torch.ones(2, 1))},
        scale=1.0,
        base_model="x",
        revision=None,
        target_modules=["q_proj"],
        card={"name": "s3cret-of-mine", "sources": {"a": {"path": "https://me:s3cret-of-mine@x.org/a"}}},
    )
    texts = [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".md", ".json", ".yaml")]
    assert {path.name for path in texts} >= {"recipe.yaml", "report.json", "report.md", "README.md"}
    for path in texts:
        assert "s3cret" not in path.read_text(), path
    assert MASK in (tmp_path / "run" / "adapter" / "README.md").read_text()


def laughs(first: str, line: str) -> str:
    """A value, and four more of which each repeats the one before it sixteen times."""
    return first + "".join(line.format(b, ", ".join([f"*{a}"] * 16)) for a, b in ("ab", "bc", "cd", "de"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (laughs("a: &a [x, x]\n", "{0}: &{0} [{1}]\n"), "more than 20,000"),
        (laughs("a: &a {x: 1}\n", "{0}: &{0} {{<<: [{1}]}}\n"), "more than 20,000"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 60, "more than 50 deep"),
        ("a: 1\nb: 2\na: 3", "'a' stands there twice"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("2001-99-99", "month"),
        ("1" * 5000, "4300"),
        ("!!int x", "invalid literal"),
        ('"\\0"', "zero byte"),
        ('"\\ud800"', "surrogate"),
    ],
)
def test_yaml_is_plain_data(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_yaml_may_repeat_a_value() -> None:
    text = "a: &a {x: 1e-4, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]"
    assert parse_yaml(text) == {"a": {"x": 1e-4, "y": 2}, "b": {"x": 1e-4, "y": 3}, "c": [{"x": 1e-4, "y": 2}] * 2}


def test_an_error_is_one_line_whatever_is_in_it() -> None:
    assert str(UserError("a\nb\x1b[31m\u2028c\ud800 ‖ΔW X‖")) == "a b\\x1b[31m c\\ud800 ‖ΔW X‖"


@pytest.mark.parametrize("key", ["tensorboard", "csv_monitor", "flops_profiler"])
def test_a_deepspeed_file_names_no_place_to_write_to(tmp_path: Path, key: str) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({key: {"enabled": True, "output_path": "/elsewhere"}}))
    with pytest.raises(ValueError, match=f"'{key}' writes files of its own outside output_dir"):
        recipe(tmp_path, engine={"name": "zero3", "config": str(tmp_path / "zero.json")})
