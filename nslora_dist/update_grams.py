"""C = A G Aᵀ of a task's training activations, beside its adapter, for merging without data (docs/methods.md §4)."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nslora_dist import dist, watch
from nslora_dist.adapter import Adapter, adapted_linears
from nslora_dist.artifacts import load_tensors, save_tensors
from nslora_dist.batches import Batch, Places, real_on
from nslora_dist.errors import UserError
from nslora_dist.provenance import UPDATE_GRAMS_FILE


def write_update_grams(folder: Path, grams: Mapping[str, Tensor]) -> None:
    """Writes ``update_grams.safetensors``: module name → C (r, r) float32.

    Raises:
        UserError: a matrix holds a value that is not finite.
    """
    for module, gram in grams.items():
        if not bool(torch.isfinite(gram).all()):
            raise UserError(f"{module}: its update Gram is not finite; lower train.learning_rate and train again")
    save_tensors(folder / UPDATE_GRAMS_FILE, {module: gram.float() for module, gram in grams.items()})


def read_update_grams(folder: Path) -> dict[str, Tensor] | None:
    """Reads them, on the CPU; None where the adapter has none.

    Raises:
        UserError: the file is unreadable, or a tensor in it is no finite, square matrix.
    """
    path = folder / UPDATE_GRAMS_FILE
    if not path.exists():
        return None
    grams = load_tensors(path)
    for module, gram in grams.items():
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not bool(torch.isfinite(gram).all()):
            raise UserError(f"{path}: {module} {tuple(gram.shape)} is no finite r x r matrix; collect the Grams again")
    return grams


@torch.no_grad()
def collect_update_grams(
    model: nn.Module, batches: Iterable[Batch], run: Callable[[Batch], object], *, device: torch.device
) -> dict[str, Tensor]:
    """Sums C = A G Aᵀ over all ranks' tokens, the adapter at work, by forward passes (docs/methods.md §4).

    A is the one that the adapter's file will hold: in residual form [A; A₀], of rank 2r. A sharded parameter is whole
    where it is read here, in the forward pass of the module that owns it.

    Args:
        model: holds adapted linears; it may be sharded.
        batches: this rank's share, on any device, the same number of batches on every rank. The padding
            behind the samples of a packed row is not marked and counts as tokens.
        run: a forward pass of ``model``, as an engine's ``matches``.
        device: where the batches are sent, and the sums are kept.

    Returns:
        Module name → (r, r) float64 on the CPU, the same on every rank.

    Raises:
        Preempted: a rank was asked to stop.
    """
    sums: dict[str, Tensor] = {}
    real: list[Places | None] = []
    hooks = [
        module.register_forward_pre_hook(partial(_add, sums, real, name))
        for name, module in adapted_linears(model).items()
    ]
    try:
        for number, batch in enumerate(batches, start=1):
            dist.stop_if_asked("export: stopped in the update Grams")
            watch.progress(f"update Grams, batch {number}")
            real[:] = [real_on(device, batch)]
            run(batch.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, module in adapted_linears(model).items():  # every rank's order, whatever ran on it
        size = module.exported_rank
        gram = sums.get(name, torch.zeros(size, size, dtype=torch.float64, device=device))
        found[name] = dist.all_reduce(gram).cpu()
    return found


def _add(
    sums: dict[str, Tensor], real: list[Places | None], name: str, module: nn.Module, args: tuple[Any, ...]
) -> None:
    assert isinstance(module, Adapter)
    gram = module.gram_of(args[0], real[0])
    sums[name] = sums[name] + gram if name in sums else gram
