"""What is on disk is the old version or the new one, and a damaged file is told by name."""

from pathlib import Path

import pytest
import torch

from nslora_dist import artifacts, folders, manifests
from nslora_dist.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_json_round_trip_and_strictness(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"ω": [1, 2.5, None], "b": {"c": True}})
    assert artifacts.read_json(path) == {"ω": [1, 2.5, None], "b": {"c": True}}
    with pytest.raises(ValueError):
        artifacts.write_json(path, {"loss": float("nan")})
    assert artifacts.read_json(path)["ω"] == [1, 2.5, None]
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b'{"a": 1', b"\xff\xfe\x00", b""])
def test_broken_json_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: broken JSON") as caught:
        artifacts.read_json(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        artifacts.read_json(tmp_path / "absent.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "t.safetensors"
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    given = {"plain": whole, "transposed": whole.T, "slice": whole[:, 1:3], "tied": whole, "scalar": whole[0, 0]}
    artifacts.save_tensors(path, given, {"step": "3"})
    back = artifacts.load_tensors(path)
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor)
    assert names(tmp_path) == ["t.safetensors"]


def test_parameters_that_require_gradients_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    artifacts.save_tensors(path, {"w": torch.nn.Parameter(torch.ones(2, 3))})
    assert not artifacts.load_tensors(path)["w"].requires_grad


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.safetensors"
    artifacts.save_tensors(path, {"w": torch.ones(3)})

    def full_disk(_tensors: object, target: Path, **_: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        artifacts.save_tensors(path, {"w": torch.zeros(3)})
    assert torch.equal(artifacts.load_tensors(path)["w"], torch.ones(3))
    assert names(tmp_path) == ["t.safetensors"]


def test_unreadable_tensors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    artifacts.save_tensors(path, {"w": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"t\.safetensors: no whole safetensors file"):
        artifacts.load_tensors(path)
    with pytest.raises(UserError, match="cannot be read"):
        artifacts.load_tensors(tmp_path / "absent.safetensors")


def test_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert artifacts.hash_file(path) == known
    monkeypatch.setattr(artifacts, "CHUNK_BYTES", 2)
    assert artifacts.hash_file(path) == known
    assert artifacts.hash_json({"a": 1, "b": (2, 3)}) == artifacts.hash_json({"b": [2, 3], "a": 1})
    assert artifacts.hash_json({"a": 1}) != artifacts.hash_json({"a": 2})
    with pytest.raises(ValueError):
        artifacts.hash_json(float("inf"))


def test_a_folder_is_made_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "adapter"
    for content in ("one", "two"):
        with folders.replace_folder(target) as folder:
            assert folder.parent == target.parent and names(folder) == []
            (folder / content).write_text(content)
            (folder / "sub").mkdir()
            (folder / "sub" / "x").write_text("x")
        assert names(target) == sorted([content, "sub"])
        assert names(target.parent) == ["adapter"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with folders.replace_folder(target) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), folders.replace_folder(target) as folder:
        (folder / "new").write_text("half")
        raise KeyboardInterrupt
    assert names(target) == ["old"] and names(tmp_path) == ["adapter"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "adapter"
    with folders.replace_folder(target) as folder:
        (folder / "old").write_text("old")
    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"), folders.replace_folder(target) as folder:
        (folder / "new").write_text("new")
    assert names(target) == ["old"] and names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("moved_aside", [True, False])
def test_what_a_killed_writer_left_is_put_right(tmp_path: Path, moved_aside: bool) -> None:
    target = tmp_path / "adapter"
    (tmp_path / ".adapter.partial").mkdir()
    (tmp_path / ".adapter.partial" / "half").write_text("half")
    (tmp_path / ".adapter.old").mkdir()
    (tmp_path / ".adapter.old" / "old").write_text("old")
    if not moved_aside:  # killed after the rename, before the clearing
        target.mkdir()
    else:
        with pytest.raises(UserError, match=r"\.adapter\.old: move it back"):
            manifests.read_manifest(target)
    with pytest.raises(RuntimeError), folders.replace_folder(target):
        raise RuntimeError
    assert names(target) == (["old"] if moved_aside else [])
    assert names(tmp_path) == ["adapter"]


def test_a_file_in_the_way_is_refused_and_a_link_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"), folders.replace_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with folders.replace_folder(tmp_path / "link") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == ["x"]


@pytest.fixture
def described(tmp_path: Path) -> Path:
    folder = tmp_path / "null_space"
    with folders.replace_folder(folder) as partial:
        artifacts.save_tensors(partial / "null_space.safetensors", {"basis": torch.ones(8, 2)})
        (partial / "notes").mkdir()
        (partial / "notes" / "a.txt").write_text("a")
        manifests.write_manifest(partial, {"tokens": 12})
    return folder


def test_manifest_lists_and_verifies(described: Path) -> None:
    (described / "unlisted").write_text("a person's own note")
    manifest = manifests.read_manifest(described)
    assert manifest["tokens"] == 12
    assert sorted(manifest["files"]) == ["notes/a.txt", "null_space.safetensors"]
    assert manifest["files"]["notes/a.txt"] == {"sha256": artifacts.hash_file(described / "notes/a.txt"), "bytes": 1}
    with pytest.raises(ValueError, match="'files' is taken"):
        manifests.write_manifest(described, {"files": {}})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.unlink(), "safetensors: missing"),
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), r"safetensors: \d+ bytes, manifest.json says \d+"),
        (lambda f: f.write_bytes(f.read_bytes()[:-1] + b"!"), "safetensors: altered"),
    ],
)
def test_damage_is_told_in_one_line(described: Path, damage, message: str) -> None:
    damage(described / "null_space.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        manifests.read_manifest(described)
    assert "\n" not in str(caught.value) and "make it again" in str(caught.value)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "manifest.json: missing"),
        ("{", "manifest.json: broken JSON"),
        ("[]", "lists no files"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        ('{"files": {}}', "has no manifest_sha256 .*make it again"),
        ({}, "lists no files"),
        ({"files": {"notes/a.txt": {}}}, "does not say its sha256"),
        ({"files": {"../x": {"sha256": "", "bytes": 1}}}, "outside its own folder"),
        ({"files": {"\0": {"sha256": "", "bytes": 1}}}, "null byte"),
    ],
)
def test_a_bad_manifest_is_refused(described: Path, manifest: str | dict | None, message: str) -> None:
    path = described / manifests.MANIFEST
    if manifest is None:
        path.unlink()
    elif isinstance(manifest, dict):
        artifacts.write_sealed(path, manifest)
    else:
        path.write_text(manifest)
    with pytest.raises(UserError, match=message) as caught:
        manifests.read_manifest(described)
    assert "\n" not in str(caught.value)


def test_the_manifest_proves_itself_to_the_byte(described: Path) -> None:
    path = described / manifests.MANIFEST
    whole = path.read_bytes()
    assert manifests.read_manifest(described)["tokens"] == 12
    for old, new in ((b'"tokens": 12', b'"tokens": 13'), (b"{\n", b"{\r\n"), (b"\n", b"\n "), (b"12,", b"12.0,")):
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(UserError, match=r"altered.*make it again"):
            manifests.read_manifest(described)
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"does not list other\.safetensors"):
        manifests.read_manifest(described, needs=["other.safetensors"])
    with pytest.raises(ValueError, match="is taken"):
        manifests.write_manifest(described, {artifacts.SELF_HASH: ""})


def test_a_link_in_the_place_of_a_partial_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / ".a.json.partial").symlink_to("mine")
    (tmp_path / ".b.partial").symlink_to("folder")
    (tmp_path / ".b.old").symlink_to("folder")
    artifacts.write_json(tmp_path / "a.json", 1)
    with folders.replace_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "mine").read_text() == "mine" and not names(tmp_path / "folder")
    assert artifacts.read_json(tmp_path / "a.json") == 1 and names(tmp_path / "b") == ["x"]
