"""The base on disk: a folder of safetensors, found locally or on the hub, read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nslora_dist import watch
from nslora_dist.errors import UserError
from nslora_dist.explain import hub_reason, nearest
from nslora_dist.named import is_local

if TYPE_CHECKING:
    from nslora_dist.recipe import BaseModelSection


COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "LICENSE*", "USE_POLICY*")
"""Beside the weights: config, tokenizer, chat template, licence."""


class BaseFiles:
    """A folder of safetensors, single-file or indexed, read tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        """Reads the index only.

        Raises:
            UserError: no safetensors there, an unreadable or incomplete index, or a shard that is missing.
        """
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                self.files: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                if not self.files or not all(isinstance(file, str) for file in self.files.values()):
                    raise TypeError("its weight_map names no files")
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{index}: not a safetensors index ({error}); fetch the checkpoint again") from error
        elif (folder / "model.safetensors").is_file():
            with self._open("model.safetensors") as opened:
                self.files = dict.fromkeys(opened.keys(), "model.safetensors")
        else:
            raise UserError(
                f"base_model.path {folder}: no model.safetensors and no model.safetensors.index.json there; "
                "only safetensors are read (no pickle): convert the checkpoint with save_pretrained"
            )
        for file in sorted(set(self.files.values())):
            if Path(file).name != file or not (folder / file).is_file():
                raise UserError(f"{folder / file}: named by the index and not there; fetch the checkpoint again")

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt", device="cpu")
        except Exception as error:  # a damaged header can make it raise many things
            raise UserError(f"{self.folder / file}: unreadable ({error}); fetch the file again") from error

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype,
        device: torch.device,
        rows: slice | None = None,
    ) -> Tensor:
        """One tensor, or some rows of it, in the dtype and on the device asked for.

        Args:
            name: in the checkpoint.
            shape: of the whole tensor, as the model's config has it.
            dtype: to cast to.
            device: to put it on.
            rows: the part of the first dimension that is read from disk; all of it where left out.

        Raises:
            UserError: it is not in the checkpoint, or not of the shape that the model's config asks for.
        """
        file = self.check(name, shape)
        with self._open(file) as opened:
            try:
                # A whole tensor is mapped and not copied where neither dtype nor device change.
                whole = rows is None or rows == slice(0, shape[0])
                value = opened.get_tensor(name) if whole else opened.get_slice(name)[rows]
                return value.to(device=device, dtype=dtype)
            except (SafetensorError, KeyError, TypeError, ValueError) as error:  # also a dtype that torch has not
                raise UserError(f"{self.folder / file}: '{name}' is unreadable ({error})") from error

    def check(self, name: str, shape: tuple[int, ...]) -> str:
        """The file that holds a tensor of that name and shape; reads its header alone.

        Raises:
            UserError: no file does, or its tensor has another shape than the model's config asks for.
        """
        file = self.files.get(name)
        if file is None:
            raise UserError(f"base_model.path {self.folder}: holds no tensor '{name}'{nearest(name, list(self.files))}")
        with self._open(file) as opened:
            try:
                found = tuple(opened.get_slice(name).get_shape())
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{self.folder / file}: '{name}' is unreadable ({error})") from error
        if found != shape:
            raise UserError(f"{self.folder / file}: '{name}' is {found}, the model's config asks for {shape}")
        return file

    def fingerprint(self) -> str:
        """sha256 over config, index, and every shard's size, header and first and last MiB.

        Reading 140 GB to recognise a base would cost more than the calibration it saves; whoever edits a weight in the
        middle of a shard in place must delete ``null_space/`` by hand.
        """
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        digest.update(json.dumps(self.files, sort_keys=True).encode())
        for file in sorted(set(self.files.values())):
            with (self.folder / file).open("rb") as stream:
                size = stream.seek(0, 2)
                digest.update(size.to_bytes(8, "little"))
                stream.seek(0)
                header = int.from_bytes(stream.read(8), "little")
                digest.update(stream.read(min(header, size) + 2**20))
                stream.seek(max(0, size - 2**20))
                digest.update(stream.read())
        return digest.hexdigest()


class _Fetching(tqdm):
    """The hub's own bar; to the other ranks every piece that arrives is a sign of progress."""

    def update(self, n: float | None = 1) -> bool | None:
        watch.progress("fetching the base model")
        return super().update(n)


def locate(section: BaseModelSection) -> Path:
    """The local folder of the base: the path itself, or a hub snapshot without pickles.

    Raises:
        UserError: neither a folder nor a hub name that can be fetched.
    """
    folder = Path(section.path)
    local = is_local(section.path, key="base_model.path")
    if local and folder.is_dir():
        return folder
    if local:
        raise UserError(f"base_model.path {section.path}: no such folder")
    try:
        patterns = ["*.safetensors", *COMPANIONS]
        return Path(
            snapshot_download(section.path, revision=section.revision, allow_patterns=patterns, tqdm_class=_Fetching)
        )
    except Exception as error:
        raise UserError(
            f"base_model.path {section.path}: no such folder, and not to be had from the hub ({hub_reason(error)})"
        ) from error
