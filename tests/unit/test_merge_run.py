"""Whole merges on disk: PEFT loads what comes out, full models equal base plus update, and what is wrong is told."""

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from helpers.merge_world import (
    AUTO,
    FIRST,
    LISTED,
    REGEX,
    dense,
    edit_config,
    load,
    logits,
    lora_modules,
    make_adapter,
    make_model,
    peft_updates,
    recipe,
    total,
    with_updates,
    write_inputs,
)
from nslora_dist import artifacts, base_files, command, watch
from nslora_dist.artifacts import write_sealed
from nslora_dist.base_files import BaseFiles
from nslora_dist.errors import EXIT_USER_ERROR, Preempted, StorageError, UserError
from nslora_dist.evaluate_adapter import run_evaluation
from nslora_dist.export import PLAIN_STARTS, Factors, read_adapter
from nslora_dist.merge import run_merge
from nslora_dist.merge_recipe import MergeBase, MergeRecipe, load_merge_recipe
from nslora_dist.merge_report import describe_merge
from nslora_dist.merging import full_model
from nslora_dist.merging.gram import merge_by_grams
from nslora_dist.merging.tasks import read_stored, same_base
from nslora_dist.provenance import PROVENANCE_FILE, Provenance, read_provenance, write_provenance
from nslora_dist.recipe_file import load_recipe
from nslora_dist.update_grams import write_update_grams

CPU = torch.device("cpu")
ATOL = 2e-5
ANY_BASE: dict[str, Any] = {"allow_mismatch": ["base"]}
"""Of logits of the order of 1 in float32: W x + B(A x) is summed in another order than (W + BA) x."""


def uneven(family: str) -> dict[str, Any]:
    """rsLoRA, a regular expression, and a rank and an alpha of their own for some modules."""
    return {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": REGEX[family],
        "rank_pattern": {LISTED[family][0]: 2},
        "alpha_pattern": {LISTED[family][1]: 7},
    }


@pytest.fixture(scope="module", params=["llama", "bert", "vit"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A base with adapters ``a`` (uneven) and ``b``, the classifiers' with heads."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    base = make_model(folder / "base", family)
    heads = {} if family == "llama" else {"modules_to_save": ["classifier"]}
    make_adapter(folder / "a", base, family, seed=1, **uneven(family), **heads)
    make_adapter(folder / "b", base, family, seed=2, r=6, **heads)
    write_inputs(folder, family)
    return family, folder


def merge(folder: Path, target: Path, **changes: Any) -> tuple[MergeRecipe, dict[str, Any]]:
    base = None if changes.pop("no_base", False) else folder / "base"
    made = recipe(base, {"a": folder / "a", "b": folder / "b"}, target, **changes)
    run_merge(made, CPU)
    return made, json.loads((target / "report.json").read_text())


def updates(folder: Path, family: str) -> list[dict[str, torch.Tensor]]:
    return [peft_updates(folder / name, folder / "base", family) for name in "ab"]


def through_peft(folder: Path, adapter: Path, family: str) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(load(folder / "base", family), str(adapter)), family)


@pytest.mark.parametrize("method", ["arithmetic", "cat"])
def test_sum_in_peft_is_the_dense_sum(world: tuple[str, Path], tmp_path: Path, method: str) -> None:
    family, folder = world
    _, report = merge(folder, tmp_path / "out", method=method, coefficients={"a": 0.7, "b": -0.4}, no_base=True)
    wanted = logits(with_updates(folder / "base", family, total(updates(folder, family), [0.7, -0.4])), family)
    torch.testing.assert_close(through_peft(folder, tmp_path / "out/adapter", family), wanted, atol=ATOL, rtol=0)
    assert (wanted - logits(load(folder / "base", family), family)).abs().max() > 100 * ATOL
    factors, config = read_adapter(tmp_path / "out/adapter")
    assert factors[FIRST[family]].rank == 2 + 6 and report["rank"] == 9
    assert config["base_model_name_or_path"] == str(folder / "base")
    assert report["adapters"]["a"]["ranks"] == "2 to 3" and report["compression_error"]["max"] == 0.0


def test_heads_are_kept_apart(world: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = world
    merge(folder, tmp_path / "out")
    heads = tmp_path / "out/heads"
    if family == "llama":
        assert not heads.exists()
        return
    for name in "ab":
        kept = load_file(heads / f"{name}.safetensors")
        with_peft = PeftModel.from_pretrained(load(folder / "base", family), str(folder / name))
        saved = with_peft.base_model.model.classifier.modules_to_save["default"].state_dict()
        assert kept.keys() == {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(kept[f"classifier.{key}"], value) for key, value in saved.items())
        plain = load(folder / "base", family)
        assert not plain.load_state_dict(kept, strict=False).unexpected_keys
    with pytest.raises(UserError, match="only plain LoRA"):
        read_adapter(folder / "a")  # unless asked for, nothing beside the factors is let through


def test_compression_reports_its_error(world: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = world
    _, report = merge(folder, tmp_path / "out", method="svd", target_rank=5)
    wanted = total(updates(folder, family), [1.0, 1.0])
    found, _ = read_adapter(tmp_path / "out/adapter")
    errors = []
    for name, exact in wanted.items():
        assert found[name].rank == 5
        u, s, vt = torch.linalg.svd(exact)
        best = u[:, :5] @ torch.diag(s[:5]) @ vt[:5]
        assert (found[name].lora_b.double() @ found[name].lora_a.double() - best).norm() < 1e-5 * best.norm()
        errors.append(float((s[5:].square().sum() / s.square().sum()).sqrt()))
    assert report["compression_error"]["max"] == pytest.approx(max(errors), rel=1e-4)


def test_full_model_is_base_plus_update(world: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = world
    _, report = merge(folder, tmp_path / "out", output="model", coefficients={"a": 0.7, "b": 0.4})
    assert report["rank"] is None
    model = getattr(transformers, AUTO[family]).from_pretrained(tmp_path / "out/model").eval()
    wanted = with_updates(folder / "base", family, total(updates(folder, family), [0.7, 0.4]))
    torch.testing.assert_close(logits(model, family), logits(wanted, family), atol=ATOL, rtol=0)
    theirs, ours = wanted.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    changed = {
        name
        for name, value in load(folder / "base", family).state_dict().items()
        if name in ours and not torch.equal(value, ours[name])
    }
    assert changed == {f"{name}.weight" for name in updates(folder, family)[0]}
    copied = {path.name for path in (tmp_path / "out/model").iterdir()}
    assert copied == {path.name for path in (folder / "base").iterdir()}


def test_sharded_bfloat16_base_is_rounded_once(tmp_path: Path) -> None:
    """Shards, their index and their dtype stay; a pickle and another model's files are not copied."""
    base = make_model(tmp_path / "plain", "llama")
    load(base, "llama", torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    (tmp_path / "base/pytorch_model.bin").write_bytes(b"no")
    (tmp_path / "base/pytorch_model.bin.index.json").write_text("{}")
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, base, "llama", seed=seed)
    merge(tmp_path, tmp_path / "out", output="model", allow_mismatch=["base"])
    shards = {path.name for path in (tmp_path / "base").glob("*.safetensors")}
    copied = {path.name for path in (tmp_path / "out/model").iterdir()}
    assert len(shards) > 2 and shards | {"model.safetensors.index.json", "config.json"} <= copied
    assert not any(name.startswith("pytorch_model") for name in copied)
    update = total([peft_updates(tmp_path / name, base, "llama") for name in "ab"], [1.0, 1.0])
    before, after = (
        load(tmp_path / "base", "llama", torch.bfloat16),
        load(tmp_path / "out/model", "llama", torch.bfloat16),
    )
    for name, value in update.items():
        old, new = before.get_submodule(name).weight, after.get_submodule(name).weight
        assert new.dtype == torch.bfloat16
        wanted = (old.float() + value.float()).bfloat16()
        assert (new == wanted).float().mean() > 0.999  # ties apart, which the order of the sum may tip
        torch.testing.assert_close(new, wanted, rtol=2**-7, atol=0)


def test_bare_encoder_under_a_classifier_is_found(tmp_path: Path) -> None:
    """The checkpoint of a BertModel has not the prefix that its modules have in a classifier."""
    base = make_model(tmp_path / "classifier", "bert")
    load(base, "bert").bert.save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, base, "bert", seed=seed, task_type="SEQ_CLS")
    merge(tmp_path, tmp_path / "out", output="model", allow_mismatch=["base"])
    changed = load_file(tmp_path / "out/model/model.safetensors")
    plain = load_file(tmp_path / "base/model.safetensors")
    update = total([peft_updates(tmp_path / name, base, "bert") for name in "ab"], [1.0, 1.0])
    for name, value in update.items():
        key = f"{name.removeprefix('bert.')}.weight"
        torch.testing.assert_close(changed[key], plain[key] + value.float())


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_sparse_merge_as_model_and_as_adapter(tmp_path: Path, method: str) -> None:
    """At full rank the adapter's SVD is the model's update."""
    base = make_model(tmp_path / "base", "llama")
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, base, "llama", seed=seed)
    sparse = {"density": 0.3, "seed": 4}
    merge(tmp_path, tmp_path / "m", method=method, sparse=sparse, output="model")
    merge(tmp_path, tmp_path / "f", method=method, sparse=sparse, target_rank=200)
    _, report = merge(tmp_path, tmp_path / "c", method=method, sparse=sparse, target_rank=6)
    assert 0.05 < report["compression_error"]["mean"] < 1.0
    changed, plain = load(tmp_path / "m/model", "llama"), load(base, "llama")
    factors, _ = read_adapter(tmp_path / "f/adapter")
    densities = []
    for name, pair in factors.items():
        update = changed.get_submodule(name).weight - plain.get_submodule(name).weight
        torch.testing.assert_close(pair.lora_b @ pair.lora_a, update, atol=1e-5, rtol=0)
        densities.append(float(((pair.lora_b @ pair.lora_a).abs() > 1e-5).float().mean()))
    assert 0.3 <= sum(densities) / len(densities) < 0.55  # of two updates that overlap by chance
    want = logits(with_updates(base, "llama", {n: (p.lora_b @ p.lora_a).double() for n, p in factors.items()}), "llama")
    torch.testing.assert_close(logits(changed, "llama"), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("granularity", ["block", "module"])
def test_nsc_writes_what_it_reports(
    world: tuple[str, Path], tmp_path: Path, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(watch, "progress", said.append)
    family, folder = world
    nsc = {"steps": 4, "learning_rate": 0.02, "batch_size": 7, "target_fraction": 0.5, "granularity": granularity}
    inputs = write_inputs(tmp_path, family)
    _, report = merge(folder, tmp_path / "out", method="nsc", nsc=nsc, inputs=inputs)
    assert sum("nsc" in text for text in said) >= 2 * 4  # or a long search would count as a standstill
    found = report["nsc"]
    assert found["losses"][-1] < found["losses"][0] and found["granularity"] == granularity
    assert found["profile"].keys() == {"a", "b"} and len(found["profile"]["a"]) == 4
    assert (tmp_path / "out/null_space_ratio.png").stat().st_size > 5000
    wanted: dict[str, torch.Tensor] = {}
    for number, update in enumerate(updates(folder, family)):
        for name, value in update.items():
            row = name if granularity == "module" else name[: re.search(r"\.\d+", name).end()]  # type: ignore[union-attr]
            wanted[name] = wanted.get(name, 0.0) + found["coefficients"][row]["ab"[number]] * value
    torch.testing.assert_close(
        through_peft(folder, tmp_path / "out/adapter", family),
        logits(with_updates(folder / "base", family, wanted), family),
        atol=ATOL,
        rtol=0,
    )


def test_every_unit_of_work_is_a_sign_of_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_model(tmp_path / "base", "llama")
    for number, name in enumerate("ab"):
        make_adapter(tmp_path / name, base, "llama", seed=number, r=3)
    said: list[str] = []
    monkeypatch.setattr(watch, "progress", said.append)
    nsc = {"steps": 2, "batch_size": 4}
    merge(tmp_path, tmp_path / "out", method="nsc", nsc=nsc, inputs=write_inputs(tmp_path, "llama"), output="model")
    modules = read_adapter(tmp_path / "a")[0]
    for number, module in enumerate(modules, start=1):
        assert f"module {number} of {len(modules)}, {module}" in said and f"adding to {module}.weight" in said
    assert {"model.embed_tokens", "model.layers.0", "step 1 of 2", "step 2 of 2"} <= set(said)
    assert said.count("ω of b, inputs 5 to 7 of 7") == 2  # before and after
    monkeypatch.setattr(watch, "stop_asked", lambda: True)
    with pytest.raises(Preempted, match=r"nsc: stopped before ω of a, inputs 1 to 4 of 7, as asked; nothing is"):
        merge(tmp_path, tmp_path / "no", method="nsc", nsc=nsc, inputs=write_inputs(tmp_path, "llama"))
    assert not (tmp_path / "no").exists()


def test_gram_merge_uses_what_lies_beside_the_adapters(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "bert")
    make_adapter(tmp_path / "a", base, "bert", seed=1)
    make_adapter(tmp_path / "b", base, "bert", seed=2, like=tmp_path / "a")
    plain = [read_adapter(tmp_path / name)[0] for name in "ab"]
    with pytest.raises(UserError, match=r"adapters\.a: method gram needs .* no update_grams\.safetensors"):
        merge(tmp_path, tmp_path / "out", method="gram")
    assert not (tmp_path / "out").exists()
    grams = []
    for name in "ab":
        generator = torch.Generator().manual_seed(ord(name))
        made = {m: torch.randn(p.rank, 30, generator=generator) for m, p in plain[0].items()}
        grams.append({m: z @ z.T for m, z in made.items()})
        write_update_grams(tmp_path / name, grams[-1])
    _, report = merge(tmp_path, tmp_path / "out", method="gram", no_base=True)
    assert report["shared_a"] and not report["warnings"]
    _, trimmed = merge(tmp_path, tmp_path / "ties", method="ties", target_rank=4, no_base=True)
    assert "does not stay on its rows" in trimmed["warnings"][0]
    found, _ = read_adapter(tmp_path / "out/adapter")
    for module, pair in found.items():
        scale = 2.0  # alpha 8, rank 4
        c = [g[module].double() for g in grams]
        b = [scale * p[module].lora_b.double() for p in plain]
        wanted = (b[0] @ c[0] + b[1] @ c[1]) @ torch.linalg.inv(c[0] + c[1])
        torch.testing.assert_close(pair.lora_b.double(), wanted, atol=1e-5, rtol=1e-4)
        assert torch.equal(pair.lora_a, plain[0][module].lora_a)
    write_update_grams(tmp_path / "b", {m: torch.eye(3) for m in plain[1]})
    with pytest.raises(UserError, match=r"adapters\.b: its Gram of .* is \(3, 3\) and its rank 4"):
        merge(tmp_path, tmp_path / "again", method="gram")


def test_gram_merge_of_different_a_says_what_it_leaves_out(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "llama")
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, base, "llama", seed=seed)
        plain = read_adapter(tmp_path / name)[0]
        write_update_grams(tmp_path / name, {m: torch.eye(p.rank) for m, p in plain.items()})
    _, report = merge(tmp_path, tmp_path / "out", method="gram", coefficients={"a": 1.0, "b": 2.0})
    assert len(report["warnings"]) == 1 and "elsewhere it is taken to have their mean energy" in report["warnings"][0]
    found, _ = read_adapter(tmp_path / "out/adapter")
    stored = [read_stored(adapter, tmp_path / adapter) for adapter in "ab"]
    for name, pair in found.items():
        assert pair.rank == 8
        pairs = [Factors(s.factors[name].lora_a, s.scales[name] * s.factors[name].lora_b) for s in stored]
        wanted = dense(merge_by_grams(pairs, [torch.eye(p.rank) for p in pairs], [1.0, 2.0]))
        assert (dense(pair) - wanted).norm() < 1e-5 * wanted.norm()


def test_flat_signal_is_in_the_report(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "vit")
    make_adapter(tmp_path / "a", base, "vit", seed=1)
    make_adapter(tmp_path / "b", base, "vit", seed=2, like=tmp_path / "a")
    inputs = write_inputs(tmp_path, "vit")
    _, report = merge(tmp_path, tmp_path / "out", method="nsc", nsc={"steps": 1}, inputs=inputs)
    assert len(report["warnings"]) == 1 and "share A" in report["warnings"][0] and "gram" in report["warnings"][0]
    assert read_adapter(tmp_path / "out/adapter")[0][FIRST["vit"]].rank == 4  # and still the exact sum


def test_a_base_that_an_adapter_does_not_name_is_refused(tmp_path: Path) -> None:
    """PEFT's own adapters carry no fingerprint: merged into another base of the same shapes they would be garbage."""
    base = make_model(tmp_path / "base", "llama")
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, base, "llama", seed=seed)
        edit_config(tmp_path / name, base_model_name_or_path="org/Base-Instruct")
    for output in ("adapter", "model"):
        with pytest.raises(UserError, match=r"adapters\.a says that it was trained on org/Base-Instruct; .*\[base\]"):
            merge(tmp_path, tmp_path / "out", output=output)
    merge(tmp_path, tmp_path / "allowed", allow_mismatch=["base"])
    for named in ("org/Base", "org/base"):  # a copy of the hub's, in a folder of that name
        for name in "ab":
            edit_config(tmp_path / name, base_model_name_or_path=named)
        merge(tmp_path, tmp_path / named.replace("/", "_"))
    assert same_base("org/x", "/cache/models--org--x/snapshots/0a1b")
    assert not same_base("org/x", "/cache/models--org--xy/snapshots/0a1b")


def test_coefficients_that_are_too_large_are_named(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "llama")
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, base, "llama", seed=seed)
    for changes in ({}, {"method": "svd", "target_rank": 3}):
        with pytest.raises(UserError, match=r"the merged factors are not finite; lower the adapters' coefficients"):
            merge(tmp_path, tmp_path / "out", coefficients={"a": 1e39, "b": 1.0}, **changes)


def test_provenance_is_compared_and_passed_on(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "llama")
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, base, "llama", seed=seed)
        write_provenance(tmp_path / name, Provenance("1" * 64, "2" * 64, "org/base"))
    with pytest.raises(UserError, match=r"base_model\.path .* is not the base of adapters\.a \(org/base"):
        merge(tmp_path, tmp_path / "out")
    merge(tmp_path, tmp_path / "out", no_base=True)
    assert read_provenance(tmp_path / "out/adapter") == Provenance("1" * 64, "2" * 64, "org/base")
    for method in ("ties", "dare_ties"):  # whose updates have left the rows of A
        merge(tmp_path, tmp_path / method, no_base=True, method=method, target_rank=2)
        assert read_provenance(tmp_path / method / "adapter") == Provenance("1" * 64, None, "org/base")
    write_provenance(tmp_path / "b", Provenance("1" * 64, "4" * 64, "org/base"))
    with pytest.raises(
        UserError, match=r"a and b differ in their calibration: 222222222222 and 444444444444; .*allow_mismatch"
    ):
        merge(tmp_path, tmp_path / "other", no_base=True)
    merge(tmp_path, tmp_path / "other", no_base=True, allow_mismatch=["calibration"])
    assert read_provenance(tmp_path / "other/adapter") == Provenance("1" * 64, None, "org/base")
    write_provenance(tmp_path / "b", Provenance("3" * 64, "2" * 64, "org/other"))
    with pytest.raises(UserError, match="differ in their base: org/base .* and org/other"):
        merge(tmp_path, tmp_path / "third", no_base=True)
    write_sealed(tmp_path / "b" / PROVENANCE_FILE, {"base": 1, "files": {}})
    with pytest.raises(UserError, match=r"nslora\.json: wants the texts"):
        merge(tmp_path, tmp_path / "third", no_base=True)


def test_every_adapter_is_compared_with_all_before_it(tmp_path: Path) -> None:
    """The first one may have been calibrated on nothing, and the other two not on the same."""
    base = make_model(tmp_path / "base", "llama")
    folders = {}
    for seed, (name, calibration) in enumerate({"plain": None, "b": "2" * 64, "c": "3" * 64}.items()):
        folders[name] = make_adapter(tmp_path / name, base, "llama", seed=seed)
        write_provenance(folders[name], Provenance("1" * 64, calibration, "org/base"))
    with pytest.raises(UserError, match=r"adapters b and c differ in their calibration: 222222222222 and 333333333333"):
        run_merge(recipe(None, folders, tmp_path / "out"), CPU)


def test_a_changed_file_is_refused_until_it_counts_as_foreign(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "llama")
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, base, "llama", seed=seed)
        write_provenance(tmp_path / name, Provenance("1" * 64, "2" * 64, "org/base"))
    edit_config(tmp_path / "b", lora_alpha=9)
    with pytest.raises(UserError, match=r"b/adapter_config\.json: .*delete nslora\.json"):
        merge(tmp_path, tmp_path / "out", no_base=True)
    (tmp_path / "b" / PROVENANCE_FILE).unlink()
    merge(tmp_path, tmp_path / "out", no_base=True)
    save_file({"x": torch.zeros(2, 2)}, tmp_path / "a" / "update_grams.safetensors")
    with pytest.raises(UserError, match=r"a/update_grams\.safetensors: nslora\.json does not list it"):
        merge(tmp_path, tmp_path / "more", no_base=True)
    (tmp_path / "a" / PROVENANCE_FILE).write_text('{"base": "1", "base_model": "b", "calibration": null}')
    with pytest.raises(UserError, match=r"nslora\.json: has no manifest_sha256 .*delete nslora\.json"):
        merge(tmp_path, tmp_path / "more", no_base=True)


def test_other_modules_count_as_no_update_where_that_is_allowed(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "llama")
    make_adapter(tmp_path / "a", base, "llama", seed=1, target_modules=["q_proj", "up_proj"])
    make_adapter(tmp_path / "b", base, "llama", seed=2, target_modules=["q_proj"], layers_to_transform=[1, 2])
    with pytest.raises(UserError, match=r"a and b differ in their target modules: 8 modules with .*allow_mismatch"):
        merge(tmp_path, tmp_path / "out")
    merge(tmp_path, tmp_path / "out", allow_mismatch=["target_modules"])
    wanted = logits(with_updates(base, "llama", total(updates(tmp_path, "llama"), [1.0, 1.0])), "llama")
    torch.testing.assert_close(through_peft(tmp_path, tmp_path / "out/adapter", "llama"), wanted, atol=ATOL, rtol=0)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    base = make_model(folder / "base", "llama")
    for seed, name in enumerate("ab"):
        make_adapter(folder / name, base, "llama", seed=seed)
    make_model(folder / "wide", "llama", hidden_size=128)
    make_adapter(folder / "wider", folder / "wide", "llama", seed=3)
    return folder


def spoil(folder: Path, how: str) -> None:
    """Damages adapter ``b`` of a copy."""
    b = folder / "b"
    weights = b / "adapter_model.safetensors"
    if how == "gone":
        shutil.rmtree(b)
    elif how == "no adapter":
        (b / "adapter_config.json").unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "config":
        (b / "adapter_config.json").write_text("{")
    elif how == "rank 0":
        edit_config(b, rank_pattern={"q_proj": 0})
    elif how == "dora":
        edit_config(b, use_dora=True)
    elif how == "transposed":
        edit_config(b, fan_in_fan_out=True)
    elif how == "tokens":
        edit_config(b, alora_invocation_tokens=[3, 4])
    elif how == "layers":
        edit_config(b, layer_replication=[[0, 3], [1, 4]])
    elif how == "blocks":
        edit_config(b, use_bdlora={"nblocks": 2})
    elif how == "parameters":
        edit_config(b, target_parameters=["mlp.experts.down_proj"])
    elif how == "head":
        tensors = load_file(weights)
        save_file(tensors | {"base_model.model.lm_head.base_layer.weight": torch.zeros(2, 2)}, weights)
    elif how in ("olora", "pissa_niter_4", "loftq"):
        edit_config(b, init_lora_weights=how)
    elif how == "alpha":
        edit_config(b, lora_alpha=None)
    elif how == "base":
        edit_config(b, base_model_name_or_path="org/another")
    elif how == "shapes":
        shutil.rmtree(b)
        shutil.copytree(folder / "wider", b)
        edit_config(b, base_model_name_or_path=str(folder / "base"))
    else:
        tensors = load_file(weights)
        key = next(name for name in tensors if name.endswith("lora_B.weight"))
        if how == "nan":
            tensors[key][0, 0] = torch.nan
        elif how == "empty":
            tensors[key] = tensors[key][:, :0]
        elif how == "half":
            del tensors[key]
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("gone", r"adapters\.b\.path .*: no such folder"),
        ("no adapter", r"adapters\.b\.path .*: no adapter there, it holds no adapter_config\.json"),
        ("truncated", r"b/adapter_model\.safetensors: no whole safetensors file"),
        ("config", r"b/adapter_config\.json: broken JSON"),
        ("rank 0", r"adapters\.b\.path .*: rank_pattern gives 'q_proj' the rank 0"),
        ("dora", r"adapters\.b\.path .*DoRA"),
        ("transposed", r"adapters\.b\.path .*transposed weights"),
        ("tokens", r"adapters\.b\.path .*alora_invocation_tokens"),
        ("layers", r"adapters\.b\.path .*layer_replication"),
        ("blocks", r"adapters\.b\.path .*was made with use_bdlora"),
        ("parameters", r"adapters\.b\.path .*was made with target_parameters, whose factors are no update of a plain"),
        ("head", r"'base_model\.model\.lm_head\.base_layer\.weight' is a copy of .*save_embedding_layers=False"),
        ("olora", r"adapters\.b\.path .*init_lora_weights='olora', which changes .*path_initial_model_for_weight_conv"),
        (
            "pissa_niter_4",
            r"adapters\.b\.path .*init_lora_weights='pissa_niter_4', .*path_initial_model_for_weight_conv",
        ),
        ("loftq", r"adapters\.b\.path .*init_lora_weights='loftq', .*made with init_lora_weights=True"),
        ("alpha", r"adapters\.b\.path .*no usable lora_alpha"),
        ("base", r"adapters a and b differ in their base: .*base and org/another; .*allow_mismatch: \[base\]"),
        ("shapes", r"adapters a and b are of different bases: .*down_proj is \(64, 128\) and \(128, 128\)"),
        ("nan", r"b/adapter_model\.safetensors: model\..*lora_B has values that are not finite"),
        ("empty", r"b/adapter_model\.safetensors: model\..*lora_B is empty"),
        ("half", r"b/adapter_model\.safetensors: model\..* has only lora_A"),
    ],
)
def test_bad_adapter_is_told_and_nothing_written(sound: Path, tmp_path: Path, how: str, said: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sound, folder)
    for name in "ab":
        edit_config(folder / name, base_model_name_or_path=str(folder / "base"))
    spoil(folder, how)
    with pytest.raises(UserError) as error:
        merge(folder, tmp_path / "out")
    assert re.search(said, str(error.value)) and "\n" not in str(error.value), str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_peft_converts_is_read_as_peft_reads_it(sound: Path, tmp_path: Path) -> None:
    """PiSSA changes the base; saved as a difference to its start it is a plain LoRA on the base as it was."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=LISTED["llama"], init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    model = get_peft_model(load(sound / "base", "llama"), config)
    start = tmp_path / "start"
    model.save_pretrained(str(start))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.ones_like(parameter)
    trained = logits(model, "llama")
    model.save_pretrained(str(tmp_path / "pissa"))
    with pytest.raises(UserError, match="init_lora_weights='pissa', which changes the base's weights"):
        read_stored("here", tmp_path / "pissa")
    model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(start))
    stored = read_stored("here", tmp_path / "plain")
    assert stored.config["init_lora_weights"] is True
    updates_of = {n: dense(p) * stored.scales[n] for n, p in stored.factors.items()}
    found = logits(with_updates(sound / "base", "llama", updates_of), "llama")
    torch.testing.assert_close(found, trained, atol=ATOL, rtol=0)


@pytest.mark.parametrize("start", PLAIN_STARTS)
def test_a_start_that_leaves_the_base_alone_is_read(sound: Path, tmp_path: Path, start: Any) -> None:
    plain = load(sound / "base", "llama")
    config = LoraConfig(r=4, target_modules=LISTED["llama"], init_lora_weights=start, task_type="CAUSAL_LM")
    model = get_peft_model(load(sound / "base", "llama"), config)
    for name, module in lora_modules(model).items():
        assert torch.equal(module.base_layer.weight, plain.get_submodule(name).weight)
    model.save_pretrained(str(tmp_path / "a"))
    assert read_stored("here", tmp_path / "a").config["init_lora_weights"] == start


def test_existing_output_is_left_alone(sound: Path, tmp_path: Path) -> None:
    for name in ("folder", "file"):
        target = tmp_path / name
        target.mkdir() if name == "folder" else target.write_text("mine")
        with pytest.raises(UserError, match=r"output_dir .*: exists already"):
            merge(sound, target)
    assert (tmp_path / "file").read_text() == "mine" and not any((tmp_path / "folder").iterdir())


def test_failure_while_writing_leaves_nothing(sound: Path, tmp_path: Path) -> None:
    """The base of another size is noticed when its first tensor is to be changed."""
    made = recipe(sound / "wide", {n: sound / n for n in "ab"}, tmp_path / "out", output="model", **ANY_BASE)
    with pytest.raises(UserError, match=r"'model\..*' is \(128, 128\), the adapters' update \(64, 128\)"):
        run_merge(made, CPU)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_told_from_what_cannot_be_read(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"output_dir .*: cannot be written \(.*; give another path") as wrong:
        merge(sound, tmp_path / "file" / "out")
    assert wrong.value.status == EXIT_USER_ERROR

    def full(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "write_json", full)
        with pytest.raises(StorageError, match=r"output_dir .*: cannot be written \(No space left .*free some disk"):
            merge(sound, tmp_path / "out")
    opened = Path.open

    def broken(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if path == sound / "base/model.safetensors":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, mode, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", broken)
        with pytest.raises(UserError, match=r"base_model\.path .*: its model\.safetensors cannot be read") as wrong:
            merge(sound, tmp_path / "out", output="model")
    assert wrong.value.status == EXIT_USER_ERROR
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_evaluation_s_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(
        StorageError, match=r"--output .*: cannot be written \(Permission denied\); give the permission"
    ):
        run_evaluation(load_recipe("tiny_math"), CPU, adapter=["x"], output=str(tmp_path / "new" / "found.json"))


def test_a_base_is_copied_in_blocks_that_count_as_progress(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_model, "COPY_BYTES", 1 << 12)
    (tmp_path / "copy").mkdir()
    said: list[str] = []
    monkeypatch.setattr(watch, "progress", said.append)
    full_model.copy_base(BaseFiles(sound / "base"), tmp_path / "copy")
    weights = (sound / "base/model.safetensors").read_bytes()
    assert said.count("copying model.safetensors") == -(-len(weights) // (1 << 12)) > 10
    assert (tmp_path / "copy/model.safetensors").read_bytes() == weights


def test_a_full_model_s_files_are_fetched_with_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"config.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "LICENSE", "USE_POLICY.md"}
    for name in (*kept, "pytorch_model.bin", "modeling_x.py", "README.md"):
        (tmp_path / "hub" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "hub" / name).write_text("{}")
    save_file({"w": torch.zeros(1)}, tmp_path / "hub" / "model.safetensors")

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str], tqdm_class: Any) -> str:
        there = [path.name for path in (tmp_path / "hub").iterdir()]
        (tmp_path / "cache").mkdir()
        for found in filter_repo_objects(there, allow_patterns=allow_patterns):
            shutil.copy(tmp_path / "hub" / found, tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr(base_files, "snapshot_download", snapshot)
    base = BaseFiles(base_files.locate(MergeBase(path="org/base")))
    (tmp_path / "out").mkdir()
    full_model.copy_base(base, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == kept | {"model.safetensors"}


def test_nsc_on_a_base_that_is_not_theirs(sound: Path, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, "llama")
    made = recipe(
        sound / "wide", {n: sound / n for n in "ab"}, tmp_path / "out", method="nsc", inputs=inputs, **ANY_BASE
    )
    with pytest.raises(UserError, match=r"q_proj is \(64, 128\), the adapters' update is \(64, 64\)"):
        run_merge(made, CPU)
    bert = make_model(tmp_path / "bert", "bert")
    made = recipe(bert, {n: sound / n for n in "ab"}, tmp_path / "out", method="nsc", inputs=inputs, **ANY_BASE)
    with pytest.raises(UserError, match=r"has no linear 'model\.layers"):
        run_merge(made, CPU)


def test_bad_inputs_of_nsc(sound: Path, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, "llama")
    for change, said in (
        ({"path": str(tmp_path / "none.jsonl")}, r"inputs\.a\.path .*none\.jsonl"),
        ({"text_field": "words"}, r"inputs\.a\.path .*no field 'words'"),
        ({"path": str(tmp_path / "none.safetensors")}, r"none\.safetensors: cannot be read"),
    ):
        changed = inputs | {"a": inputs["a"] | change}
        with pytest.raises(UserError, match=said):
            merge(sound, tmp_path / "out", method="nsc", inputs=changed)
    save_file({"input_ids": torch.ones(3, 4), "attention_mask": torch.ones(2, 4)}, tmp_path / "odd.safetensors")
    odd = inputs | {"b": {"path": str(tmp_path / "odd.safetensors")}}
    with pytest.raises(UserError, match=r"inputs\.b\.path .*same number of rows"):
        merge(sound, tmp_path / "out", method="nsc", inputs=odd)


def two(a: float, b: float) -> dict[str, Any]:
    return {"a": {"path": "x", "coefficient": a}, "b": {"path": "y", "coefficient": b}}


RECIPES: list[tuple[dict[str, Any], str]] = [
    ({"adapters": {"a": {"path": "x"}}}, r"at least two, this recipe names 1"),
    ({"adapters": {"a": {"path": "x", "coefficient": 1.0}, "b": {"path": "y"}}}, r"adapters\.b\.coefficient: missing"),
    ({"adapters": {"a/c": {"path": "x"}, "b": {"path": "y"}}}, r"adapters\.a/c: a name becomes a file name"),
    ({"methods": "ties"}, r"methods: unknown key \(did you mean 'method'"),
    ({"nsc": {"step": 3}, "method": "nsc"}, r"nsc\.step: unknown key \(did you mean 'steps'"),
    ({"method": "fisher"}, r"method: "),
    ({"method": "nsc"}, r"base_model: missing, and method nsc runs it"),
    ({"output": "model"}, r"base_model: missing, and output model"),
    ({"method": "nsc", "base_model": {"path": "x"}}, r"inputs\.a: missing"),
    ({"inputs": {"a": {"path": "x"}}}, r"inputs: only method nsc"),
    ({"method": "svd"}, r"target_rank: missing, and method svd"),
    ({"method": "cat", "target_rank": 3}, r"target_rank: cat is exact"),
    ({"method": "ties"}, r"target_rank: missing; the result of ties"),
    ({"sparse": {"density": 0.5}}, r"sparse: belongs to method ties or dare_ties"),
    ({"method": "ties", "sparse": {"density": 0.0}, "target_rank": 2}, r"sparse\.density: "),
    *(
        (
            {"method": "gram", "adapters": two(1.0, bad)},
            r"adapters\.b\.coefficient: is .*method gram weighs .* positive number",
        )
        for bad in (0.0, -0.5)
    ),
    ({"allow_mismatch": ["bases"]}, r"allow_mismatch"),
    ({"target_rank": 0}, r"target_rank: "),
]


@pytest.mark.parametrize(("change", "said"), RECIPES)
def test_wrong_recipe_is_told_in_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    tree = {"adapters": {"a": {"path": "x"}, "b": {"path": "y"}}, "method": "arithmetic"} | change
    (tmp_path / "r.yaml").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=said) as error:
        load_merge_recipe(str(tmp_path / "r.yaml"))
    assert "\n" not in str(error.value) and "r.yaml" in str(error.value)


def test_recipe_from_file_with_overrides(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / "a", tmp_path / "a")
    text = "adapters:\n  a: {path: ./a}\n  b: {path: ./b}\nmethod: ties\ntarget_rank: 2\n"
    (tmp_path / "mine.yaml").write_text(text)
    made = load_merge_recipe(str(tmp_path / "mine.yaml"), [f"adapters.b.path={sound / 'b'}", "sparse.density=5e-1"])
    assert made.name == "mine" and made.output_dir == "runs/mine"
    assert made.adapters["a"].path == str(tmp_path / "a")
    assert made.sparse is not None and made.sparse.density == 0.5
    said = describe_merge(made)
    assert "a: 12 modules, rank 4, base " in said and "density: 0.5" in said


def test_a_merge_has_a_time_out_of_its_own() -> None:
    assert command._times(load_merge_recipe("merge_tiny", ["timeout_seconds=7200"])) == {"timeout_seconds": 7200.0}


def test_shipped_recipe_merges_what_the_demo_leaves(tmp_path: Path) -> None:
    """A null-space adapter and a plain LoRA, which was calibrated on nothing."""
    made = load_merge_recipe("merge_tiny")
    assert Path(made.adapters["lora"].path).parts[-3:] == ("tiny_math", "baselines", "lora")
    assert made.base_model is not None
    base = Path(made.base_model.path)
    given = [f"output_dir={tmp_path / 'out'}"]
    for name, rank, calibration in (("null_space", 16, "2" * 64), ("lora", 8, None)):
        folder = make_adapter(tmp_path / name, base, "llama", seed=rank, r=rank, lora_alpha=rank)
        write_provenance(folder, Provenance(BaseFiles(base).fingerprint(), calibration, str(base)))
        given.append(f"adapters.{name}.path={folder}")
    run_merge(load_merge_recipe("merge_tiny", given), CPU)
    found, _ = read_adapter(tmp_path / "out/adapter")
    wanted = total([peft_updates(tmp_path / name, base, "llama") for name in ("null_space", "lora")], [0.5, 0.5])
    for name, pair in found.items():
        assert pair.rank == 24
        torch.testing.assert_close(dense(pair), wanted[name], atol=1e-6, rtol=0)
    written = read_provenance(tmp_path / "out/adapter")
    assert written is not None and written.calibration is None
