"""A merged full model: the base's own files with ΔW added to the adapted weights, one tensor in memory at a time."""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from nslora_dist import artifacts, watch
from nslora_dist.base_files import COMPANIONS, BaseFiles
from nslora_dist.errors import UserError
from nslora_dist.explain import nearest
from nslora_dist.merging.model import AUTO_CLASSES
from nslora_dist.merging.updates import Update

COPY_BYTES = 1 << 24
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def copy_base(checkpoint: BaseFiles, target: Path) -> None:
    """Copies the base's safetensors shards and what lies beside them; code and other formats of its weights stay.

    The weights' index is among it, for shards keep their names and tensors their places. Block by block, each of which
    counts as progress: a large base takes longer than other ranks would wait in silence.

    Raises:
        UserError: a file of the base cannot be read.
    """
    names = {path.name for pattern in COMPANIONS for path in checkpoint.folder.glob(pattern) if path.is_file()}
    names -= {path.name for path in checkpoint.folder.glob("*.index.json") if "safetensors" not in path.name}
    names -= {"adapter_config.json"}
    for name in sorted(names | set(checkpoint.files.values())):
        with artifacts.naming(target / name), (target / name).open("wb") as file:
            for block in _blocks(checkpoint.folder / name):
                file.write(block)
                watch.progress(f"copying {name}")


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(COPY_BYTES):
                yield block
    except OSError as error:
        said = f"its {path.name} cannot be read ({error.strerror or error})"
        raise UserError(f"base_model.path {path.parent}: {said}; check that file") from error


def checkpoint_names(
    modules: Iterable[str], checkpoint: BaseFiles, config: PreTrainedConfig, *, kind: str
) -> dict[str, str]:
    """Module → the tensor that holds its weight on disk.

    Both may differ: transformers renames the parts of older models as it loads them, and a checkpoint of a bare encoder
    lacks the prefix that the encoder has inside a classifier.

    Raises:
        UserError: none, or more than one tensor could be meant.
    """
    found: dict[str, str] = {}
    model: Any = None
    for module in modules:
        key = f"{module}.weight"
        if key not in checkpoint.files and model is None:
            with torch.device("meta"):
                model = getattr(transformers, AUTO_CLASSES[kind]).from_config(config, trust_remote_code=False)
        if key not in checkpoint.files:
            key = _stored_name(model, key)
        if key not in checkpoint.files:
            near = [name for name in checkpoint.files if key.endswith(f".{name}") or name.endswith(f".{key}")]
            if len(near) != 1:
                hint = nearest(key, list(checkpoint.files))
                raise UserError(
                    f"base_model.path {checkpoint.folder}: holds no tensor '{key}'{hint}, which the adapters change; "
                    "give the base that they were trained on"
                )
            key = near[0]
        found[module] = key
    return found


def _stored_name(model: Any, key: str) -> str:
    from transformers.core_model_loading import revert_weight_conversion

    stored = revert_weight_conversion(model, {key: torch.empty(1, 1, device="meta")})
    return next(iter(stored)) if len(stored) == 1 else key


def add_update(folder: Path, files: Mapping[str, str], name: str, update: Update) -> None:
    """Adds ΔW to one tensor of a copied checkpoint in place: summed in float32, rounded once to the tensor's dtype.

    Args:
        folder: the copy.
        files: tensor name → file in it.
        name: of the tensor, (d_out, d_in) of a float dtype.
        update: of the same shape; rows are read, added and written block by block.

    Raises:
        UserError: the tensor has another shape, or a dtype that nothing can be added to.
    """
    path = folder / files[name]
    with path.open("r+b") as file:
        length, entry = _entry(path, file, name)
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UserError(
                f"base_model.path: its '{name}' is stored as {entry['dtype']}; give a base of a float dtype"
            )
        if tuple(entry["shape"]) != update.shape:
            raise UserError(
                f"base_model.path: its '{name}' is {tuple(entry['shape'])}, the adapters' update {update.shape}; "
                "give the base that they were trained on"
            )
        begin = 8 + length + entry["data_offsets"][0]
        row_bytes = update.shape[1] * dtype.itemsize
        for start, block in update.blocks():
            position, size = begin + start * row_bytes, len(block) * row_bytes
            file.seek(position)
            old = torch.frombuffer(bytearray(file.read(size)), dtype=dtype).view(block.shape)
            new = (old.to(torch.promote_types(dtype, torch.float32)) + block.cpu()).to(dtype)
            if not bool(torch.isfinite(new).all()):
                raise UserError(f"{name}: the merged weight is not finite in {dtype}; lower the coefficients")
            file.seek(position)
            file.write(_bytes(new))


def _entry(path: Path, file: BinaryIO, name: str) -> tuple[int, dict[str, Any]]:
    """The header's length, and what it says of a tensor."""
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:  # checks the header against the file
            opened.get_slice(name)
        length: int = struct.unpack("<Q", file.read(8))[0]
        return length, json.loads(file.read(length))[name]
    except Exception as error:  # safetensors raises what it meets in a damaged header
        raise UserError(f"{path.name} of base_model.path: '{name}' is unreadable ({error}); fetch it again") from error


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
