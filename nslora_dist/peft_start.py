"""The null-space start in a PEFT model of somebody else's, sharded or in 4 bits as it may be (docs/methods.md §1a)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from nslora_dist import dist
from nslora_dist.calibration import store
from nslora_dist.calibration.store import NullSpace
from nslora_dist.errors import UserError
from nslora_dist.export import changes_base
from nslora_dist.live_model import bare, bare_name, exact
from nslora_dist.merging.blocks import is_in_block
from nslora_dist.null_space import interference


def init_peft(
    model: nn.Module, null_space_folder: str | Path, *, adapter_name: str = "default", keep_b: bool = False
) -> dict[str, nn.Module]:
    """Starts every LoRA layer of a PEFT model in the null space: A = A₀, frozen, and B = 0.

    Call it before the optimizer is made, on every rank: rank 0 alone reads the folder. Parameters may be whole,
    partitioned by ZeRO-3 or sharded by FSDP2; the base may be in any number of bits, for it is not touched.

    PEFT itself sets A to be trained again, in ``set_adapter``, on leaving ``disable_adapter`` and in
    ``PeftModel.from_pretrained(..., is_trainable=True)``: call this after them, with ``keep_b`` where B is trained.

    Args:
        model: PEFT's, around the base that was calibrated, or a DeepSpeed engine or DistributedDataParallel around it.
        null_space_folder: what ``calibrate`` or ``launch/calibrate.py`` wrote.
        adapter_name: PEFT's name of the adapter.
        keep_b: leaves B as it is: of an adapter that was started here and is trained on.

    Returns:
        The LoRA layers by their names in the bare model.

    Raises:
        UserError: no LoRA layers, DoRA, biases or embeddings that would be trained beside them, an initialisation that
            rewrites the base, a layer that was not calibrated, or a rank other than the null space's; on every rank.
    """
    null_space, layers = _fitting(model, Path(null_space_folder), adapter_name, caller="init_peft")
    some = next(iter(layers.values())).lora_A[adapter_name].weight
    with exact(some.device):
        for name, start in null_space.starts(layers, device=some.device):
            a = layers[name].lora_A[adapter_name].weight
            b = layers[name].lora_B[adapter_name].weight
            overwrite(a, start.a)
            if not keep_b:
                overwrite(b, torch.zeros(_shape(b), device=start.a.device))
            a.requires_grad_(False)
    return layers


def peft_interference(
    model: nn.Module, null_space_folder: str | Path, *, adapter_name: str = "default"
) -> dict[str, dict[str, float]]:
    """How much a model started by ``init_peft`` disturbs what was calibrated on, at any time (docs/methods.md §1c).

    Collective where a process group runs.

    Args:
        model: PEFT's, or what it was wrapped in for training: a DeepSpeed engine, DistributedDataParallel.
        null_space_folder: the one that ``init_peft`` was given.
        adapter_name: PEFT's name of the adapter.

    Returns:
        Source or probe → module → ‖ΔW X‖_F / ‖W X‖_F on the calibration's activations; without the modules whose W X
        is zero.

    Raises:
        UserError: no LoRA layers, a null space that is not theirs, or an A that is not where ``init_peft`` put it; on
            every rank.
    """
    null_space, layers = _fitting(model, Path(null_space_folder), adapter_name, caller="peft_interference")
    found: dict[str, dict[str, float]] = {}
    some = next(iter(layers.values())).lora_A[adapter_name].weight
    with exact(some.device):
        for name, start in null_space.starts(layers, device=some.device):
            a, b = (whole(side[adapter_name].weight) for side in (layers[name].lora_A, layers[name].lora_B))
            if not _is_start(a, start.a):
                raise UserError(
                    f"peft_interference: the lora_A of {name} is not the null space's, so what it reads is not known. "
                    "Was it trained? PEFT's set_adapter, disable_adapter and from_pretrained(is_trainable=True) undo "
                    "the freezing; call init_peft after them, with keep_b=True where B is trained"
                )
            b = layers[name].scaling[adapter_name] * b.float()
            for source, gram in start.update_grams.items():
                if start.references[source] > 0:
                    value = interference(gram, b.to(gram.device), start.references[source])
                    found.setdefault(source, {})[name] = float(value)
    return found


def _read(folder: Path) -> NullSpace:
    with dist.together("reading the null space"):
        found = store.load(folder) if dist.is_main() else None
    manifest = dist.share(found.manifest if found is not None else None)
    return found if found is not None else NullSpace(manifest=manifest, tensors={})  # type: ignore[arg-type]


def _fitting(model: nn.Module, folder: Path, adapter: str, *, caller: str) -> tuple[NullSpace, dict[str, Any]]:
    """The null space and the LoRA layers that it fits, by their names in the bare model."""
    null_space = _read(folder)
    layers: dict[str, Any] = {}
    with dist.together("looking at the adapter"):
        try:
            layers = _lora_layers(bare(model), adapter)
            _check(bare(model), layers, null_space, adapter, folder)
        except UserError as error:
            raise UserError(f"{caller}: {error}") from error
    return null_space, layers


def _lora_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    for name, module in model.named_modules():
        if adapter in (getattr(module, "lora_embedding_A", None) or {}):
            raise UserError(
                f"{bare_name(name)} is an embedding with an adapter, which no null space holds back; leave it out of "
                "the adapter's target_modules"
            )
    layers = {
        bare_name(name): module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and adapter in module.lora_A
    }
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no LoRA layers of an adapter named '{adapter}'; "
            "make one with peft.get_peft_model first"
        )
    return layers


def _check(model: nn.Module, layers: dict[str, Any], null_space: NullSpace, adapter: str, folder: Path) -> None:
    config = getattr(model, "peft_config", {}).get(adapter)
    if getattr(config, "use_dora", False):
        raise UserError("the adapter is DoRA, whose magnitudes rescale the base; use plain LoRA")
    start = getattr(config, "init_lora_weights", True)
    if changes_base(start):
        raise UserError(f"init_lora_weights={start!r} has rewritten the base's weights; make the adapter with True")
    if start == "mica":
        raise UserError("init_lora_weights='mica' freezes B, and A is frozen here; make it with True")
    for name, layer in layers.items():
        variant = (getattr(layer, "lora_variant", None) or {}).get(adapter)
        if variant is not None:
            raise UserError(
                f"{name} has PEFT's {type(variant).__name__}, whose update is not B A alone; use plain LoRA"
            )
    _check_beside(model, adapter)
    if getattr(config, "lora_bias", False) or getattr(config, "bias", "none") != "none":
        raise UserError(
            "the adapter trains biases, which no null space holds back; use bias='none' and lora_bias=False"
        )
    manifest = null_space.manifest
    rank = manifest["settings"]["rank"]
    if manifest["settings"]["form"] != "delta":
        raise UserError(f"{folder} is for the residual form; calibrate with adapter.form=delta")
    for name, layer in layers.items():
        if not isinstance(layer.get_base_layer(), nn.Linear):
            raise UserError(
                f"{name} has an adapter and is no nn.Linear but {type(layer.get_base_layer()).__name__}, of which "
                "calibration knows nothing; leave it out of the adapter's (exclude_modules)"
            )
        if name not in manifest["modules"]:
            raise UserError(
                f"{name} has an adapter and was not calibrated ({folder}); calibrate with it among "
                "target_modules, or leave it out of the adapter's"
            )
        if layer.r[adapter] != rank:
            raise UserError(
                f"{name} has rank {layer.r[adapter]}, the null space {folder} has {rank}; give both the same"
            )
        width = manifest["groups"][manifest["modules"][name]["group"]]["in_features"]
        found = _shape(layer.lora_A[adapter].weight)
        if found != (rank, width):
            raise UserError(f"{name}'s lora_A is {found}, the null space {folder} fits {(rank, width)}")


def _check_beside(model: nn.Module, adapter: str) -> None:
    """Refuses what trains beside the adapter, but a head that is new, as PEFT adds one for a classifier."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        inner = getattr(module, "original_module", None)
        if not isinstance(inner, nn.Module):  # as PEFT's wrappers of what trains beside an adapter keep it
            continue
        copies = getattr(module, "modules_to_save", None)
        if copies is not None and adapter not in copies:
            continue
        of_base = (
            copies is None  # single tokens of an embedding
            or is_in_block(bare_name(name))
            or head in (module, inner)
            or any(isinstance(m, nn.Embedding) or "norm" in type(m).__name__.lower() for m in inner.modules())
        )
        if of_base:
            raise UserError(
                f"{bare_name(name)} would be trained whole beside the adapter (modules_to_save, "
                "trainable_token_indices), which no null space holds back; leave it out"
            )


def _is_start(a: Tensor, start: Tensor) -> bool:
    """Whether A is A₀, or A₀ as it was before it came through 16 bits."""
    return any(torch.equal(a, start.to(dtype).to(a)) for dtype in (a.dtype, torch.bfloat16, torch.float16))


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """The whole parameter's, where ZeRO-3 has left an empty one."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter that may be sharded; collective if it is."""
    if hasattr(parameter, "ds_id"):
        from nslora_dist.engines.zero3 import gathered

        return gathered(parameter)
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    """Puts the whole ``value``, the same on every rank, into a parameter that may be sharded."""
    if hasattr(parameter, "ds_id"):
        from nslora_dist.engines.zero3 import refill

        refill(parameter, value)
        return
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = value.redistribute(placements=parameter.placements)
    parameter.copy_(value)
