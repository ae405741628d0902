"""Whatever somebody hands over: it is read, or refused in one line; no code runs, and nothing else is written.

A short selection by default; the whole, more than 2,000 examples, with ``NSLORA_FAULTS=full``.
"""

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from faults.test_bytes import make_adapter, make_null_space, make_weight_null_space
from helpers.merge_world import recipe as merge_recipe
from helpers.nasty import TEXTS, as_json, leaves, mutated, safetensors_file, spoiled, values
from helpers.world import make_base
from nslora_dist import artifacts, manifests
from nslora_dist.base_config import load_config
from nslora_dist.base_files import BaseFiles
from nslora_dist.base_model import build_empty
from nslora_dist.calibration import store
from nslora_dist.calibration.weights import WeightNullSpace
from nslora_dist.errors import UserError
from nslora_dist.merge import run_merge
from nslora_dist.merge_recipe import load_merge_recipe
from nslora_dist.recipe import BaseModelSection, Recipe
from nslora_dist.recipe_file import RECIPES, load_recipe

FULL = os.environ.get("NSLORA_FAULTS") == "full"
CANARY = "nslora_canary"
"""A file that the code hidden in the inputs would make, in the working folder."""
FRAGMENTS = [
    f'!!python/object/apply:os.system ["touch {CANARY}"]',
    f"!!python/object/new:open [{CANARY}, w]",
    "!!python/name:os.system",
    "!!binary x",
    "!!timestamp x",
    "!!int x",
    "!!float x",
    "!!set {a}",
    "!!omap [a: 1]",
    "2001-99-99",
    "&a [*a, *a]",
    "*a",
    "<<: {name: x}",
    "[" * 200,
    "{a: " * 100,
    "? [a]",
    "\t",
    "%",
    "\ufeff",
    ": ",
    "\n",
    "1" * 5000,
    "0x",
    "1_0:59:60",
    ".inf",
    ".nan",
    '"\\ud800"',
    '"\\0"',
    *TEXTS[:8],
]


def examples(full: int) -> Callable[..., Any]:
    short = max(12, full // 16)
    return settings(
        max_examples=full if FULL else short,
        derandomize=True,  # a failure comes again
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def read(load: Callable[[], Any]) -> Any:
    """What ``load`` returns, or None after a clear refusal; anything else that it raises fails the test."""
    try:
        return load()
    except UserError as error:
        message = str(error)
        assert message and "\n" not in message, repr(message)
        assert "Traceback" not in message
        return None


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An empty working folder, in which hidden code would leave its canary."""
    folder = tmp_path_factory.mktemp("room")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)
    assert not list(folder.rglob(f"{CANARY}*"))


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


TINY = (RECIPES / "tiny_math.yaml").read_text()
MERGE = (RECIPES / "merge_tiny.yaml").read_text()


@examples(400)
@given(spoiled(TINY, FRAGMENTS) | mutated(yaml.safe_load(TINY)).map(as_json) | st.text())
@example(f'name: !!python/object/apply:os.system ["touch {CANARY}"]')
@example("a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghij")))
def test_recipes(room: Path, text: str) -> None:
    made = read(lambda: load_recipe(str(write(room / "r.yaml", text))))
    if made is not None:
        again = Recipe.model_validate(yaml.safe_load(made.to_yaml()))
        assert again == made and "/" not in made.name


KEYS = [
    "name",
    "output_dir",
    "engine",
    "engine.name",
    "adapter.rank",
    "train.betas",
    "evaluation.baselines.x.adapter.rank",
]


@examples(400)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(KEYS) | st.text(max_size=10),
            st.sampled_from(FRAGMENTS) | leaves.map(as_json) | st.text(max_size=10),
        ).map("=".join),
        max_size=3,
    )
)
@example(["engine.name=single", "engine=null"])
def test_overrides(room: Path, overrides: list[str]) -> None:
    read(lambda: load_recipe("tiny_math", overrides))


@examples(300)
@given(spoiled(MERGE, FRAGMENTS) | mutated(yaml.safe_load(MERGE)).map(as_json))
def test_merge_recipes(room: Path, text: str) -> None:
    made = read(lambda: load_merge_recipe(str(write(room / "m.yaml", text))))
    if made is not None:
        assert not any("/" in name for name in (made.name, *made.adapters))


@pytest.fixture(scope="module")
def stored(room: Path) -> Path:
    make_null_space(room / "null_space")
    make_weight_null_space(room / "weights")
    return room


def resealed(path: Path) -> Any:
    """A sealed file's contents, without its hash."""
    return {key: value for key, value in json.loads(path.read_text()).items() if key != artifacts.SELF_HASH}


@examples(300)
@given(st.data(), st.booleans(), st.booleans())
def test_manifests_that_prove_themselves(stored: Path, data: st.DataObject, weights: bool, files: bool) -> None:
    """Whoever writes a manifest can seal it as well: then its contents still have to be what is read of them."""
    folder, kind = (stored / "weights", WeightNullSpace) if weights else (stored / "null_space", store.NullSpace)
    path = folder / manifests.MANIFEST
    whole = path.read_bytes()
    tree = resealed(path)
    changed = data.draw(mutated(tree) if files else mutated({k: v for k, v in tree.items() if k != "files"}))
    changed = changed if files or not isinstance(changed, dict) else changed | {"files": tree["files"]}
    try:
        try:
            artifacts.write_sealed(path, changed)
        except (TypeError, ValueError):  # nothing that can be sealed
            write(path, as_json(changed))
        found: Any = read(lambda: store.load(folder, kind))
        if found is not None and weights:
            read(lambda: found.facts(4))
            [found.bases(name, device=torch.device("cpu")) for name, rank in found.sizes(4).items() if rank.rank]
        elif found is not None:
            list(found.starts(found.manifest["modules"], device=torch.device("cpu")))
            found.leak()
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def adapters(room: Path) -> Path:
    for name in "ab":
        make_adapter(room / name)
    return room


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@examples(400)
@given(st.data(), st.sampled_from(["adapter_config.json", "nslora.json", "adapter_model.safetensors"]), st.booleans())
def test_adapters(adapters: Path, data: st.DataObject, name: str, text: bool) -> None:
    """Of another project, so that nothing is hashed, and of this one, sealed again by whoever changed it."""
    folder = adapters / "changed"
    for left in (folder, adapters / "out"):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(adapters / "b", folder)
    path = folder / name
    if name == "nslora.json":
        changed = data.draw(mutated(resealed(path)))
        try:
            artifacts.write_sealed(path, changed)
        except (TypeError, ValueError):
            write(path, as_json(changed))
    else:
        (folder / "nslora.json").unlink()
    if name == "adapter_config.json":
        whole = path.read_text()
        write(path, data.draw(spoiled(whole, TEXTS)) if text else as_json(data.draw(mutated(json.loads(whole)))))
    elif name == "adapter_model.safetensors":
        path.write_bytes(data.draw(headers(path.read_bytes())))
    target = adapters / "out" / "merged"
    before = listing(adapters)
    made = merge_recipe(None, {"a": adapters / "a", "b": folder}, target, method=data.draw(METHODS))
    read(lambda: run_merge(made, torch.device("cpu")))
    shutil.rmtree(adapters / "out", ignore_errors=True)
    assert listing(adapters) == before


METHODS = st.sampled_from(["arithmetic", "cat", "gram"])


@st.composite
def headers(draw: st.DrawFn, whole: bytes) -> bytes:
    """A safetensors file whose header was changed: its text, what it says, or its length."""
    length = int.from_bytes(whole[:8], "little")
    header, tensors = whole[8 : 8 + length].decode(), whole[8 + length :]
    stated = draw(st.none() | st.none() | st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1, length + 1, length - 1]))
    changed = draw(mutated(json.loads(header)) | spoiled(header, TEXTS))
    return safetensors_file(changed, draw(st.sampled_from([tensors, tensors, tensors[:-1], b""])), length=stated)


@pytest.fixture(scope="module")
def base(room: Path) -> Path:
    folder = make_base(room / "base")
    shards = {"first.safetensors": ["a", "b"], "second.safetensors": ["c"]}
    (room / "indexed").mkdir()
    for file, names in shards.items():
        save_file({name: torch.ones(4, 2) for name in names}, room / "indexed" / file)
    return folder


@examples(300)
@given(st.data())
def test_headers_of_a_base(base: Path, data: st.DataObject) -> None:
    folder = base.parent / "indexed"
    index = folder / "model.safetensors.index.json"
    tree: Any = {"weight_map": {"a": "first.safetensors", "b": "first.safetensors", "c": "second.safetensors"}}
    whole = (folder / "first.safetensors").read_bytes()
    if data.draw(st.booleans()):
        tree = data.draw(mutated(tree))
    else:
        (folder / "first.safetensors").write_bytes(data.draw(headers(whole)))
    write(index, as_json(tree))

    def load() -> None:
        checkpoint = BaseFiles(folder)
        (folder / "config.json").write_text("{}")
        checkpoint.fingerprint()
        for name in "abc":
            checkpoint.read(name, (4, 2), dtype=torch.float32, device=torch.device("cpu"))
            checkpoint.read(name, (4, 2), dtype=torch.float32, device=torch.device("cpu"), rows=slice(1, 3))

    try:
        read(load)
    finally:
        (folder / "first.safetensors").write_bytes(whole)


@examples(300)
@given(st.data())
def test_configs_of_a_base(base: Path, data: st.DataObject) -> None:
    path = base / "config.json"
    whole = path.read_text()
    tree = json.loads(whole)
    try:
        write(path, data.draw(mutated(tree).map(as_json) | spoiled(whole, TEXTS) | values.map(as_json)))
        section = BaseModelSection(path=str(base), dtype="float32")
        config = read(lambda: load_config(section))
        if config is not None:
            read(lambda: build_empty(section, config))
    finally:
        path.write_text(whole)
