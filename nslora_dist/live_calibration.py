"""Calibrating any Hugging Face model where it stands: whole or sharded, in 4 bits, language model, encoder or vision.

For people who train with PEFT, TRL or a loop of their own (``peft_start.py`` is the other half). The streamed pass of
``calibration/`` reads a checkpoint block by block and knows LLaMA's layout; this one runs the model's own forward pass
under hooks, so it needs no layout and leaves sharding to whoever did it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nslora_dist import artifacts, dist, nf4
from nslora_dist.calibration import store
from nslora_dist.calibration.grams import mirror
from nslora_dist.calibration.store import MIXTURE, NullSpace
from nslora_dist.errors import UserError
from nslora_dist.explain import nearest
from nslora_dist.live_grams import Group, first_batch, groups_of, run_batch, sum_grams
from nslora_dist.live_model import bare, evaluating, exact, linears_of
from nslora_dist.null_space import (
    gram_in_basis,
    leak_of,
    null_basis,
    projected_init,
    random_leak,
)
from nslora_dist.triangle import pack_triangle, unpack_triangle

A_INITS: tuple[str, ...] = ("orthonormal", "projected")
METHODS: tuple[str, ...] = ("fast", "eigh")


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rank: int,
    folder: str | Path | None = None,
    target_modules: Sequence[str] | None = None,
    a_init: Literal["orthonormal", "projected"] = "orthonormal",
    method: Literal["fast", "eigh"] = "fast",
    gram_bytes: float = 8e9,
) -> NullSpace:
    """The activation null space of every linear of a live model (docs/methods.md §1).

    Collective where a process group runs: every rank brings its own batches, and under ZeRO-3 or FSDP2 as many of them
    as the others. The model is run in evaluation mode and is left as it was. With an adapter in place its base is
    calibrated only as long as the adapter adds nothing, as PEFT starts it.

    Args:
        model: any module whose call takes a batch: Hugging Face's, PEFT's around one, a DeepSpeed engine around either.
        batches: what it is called with, as keywords (a mapping) or as one tensor; gone through several times, so a list
            or a loader, no generator. Tokens whose ``attention_mask`` is 0 are left out.
        rank: r of the adapters to come.
        folder: where rank 0 writes the artifact that ``init_peft`` reads; nothing is written where left out.
        target_modules: last parts of ``nn.Linear``s' names, as in PEFT; every one but the output embedding where left
            out.
        a_init: ``projected`` reads every weight inside a forward pass, ``orthonormal`` none.
        method: of the eigensolver.
        gram_bytes: Grams held at once, on the device: more groups than fit take further passes over the batches.

    Returns:
        The null space; tensors on rank 0 alone.

    Raises:
        UserError: an encoder-decoder model, a setting that there is not, no such target, no ``nn.Linear`` that runs, a
            rank above a width, batches that cannot be gone through twice, activations that are not finite, or a folder
            that exists.
    """
    with dist.together("looking at what is to be calibrated"):
        for key, value, known in (("a_init", a_init, A_INITS), ("method", method, METHODS)):
            if value not in known:
                raise UserError(
                    f"calibrate: {key} '{value}'{nearest(str(value), known)}; there is {' and '.join(known)}"
                )
        if rank < 1:
            raise UserError(f"calibrate: rank {rank}; give 1 or more")
        if isinstance(batches, Iterator):
            raise UserError("calibrate: batches is a generator, which ends after one pass; give a list or a DataLoader")
        if folder is not None and dist.is_main() and (Path(folder).exists() or Path(folder).is_symlink()):
            raise UserError(f"calibrate: {folder} exists already; give a new folder")
        if getattr(getattr(bare(model), "config", None), "is_encoder_decoder", False):
            raise UserError(
                "calibrate: in an encoder-decoder model attention_mask is the encoder's alone, and the padding of the "
                "decoder would count; only models with one stack of blocks can be calibrated"
            )
        linears = linears_of(model, target_modules)
        if a_init == "projected":
            _check_readable(linears)
    with evaluating(model):
        groups = groups_of(model, linears, batches)
        for group in groups:
            if rank > group.width:
                raise UserError(f"calibrate: rank {rank} is above the {group.width} inputs of {group.name}")
        tensors: dict[str, Tensor] = {}
        manifest: dict[str, Any] = {
            "kind": "null_space",
            "settings": {"rank": rank, "a_init": a_init, "form": "delta"},
            "groups": {},
            "modules": {},
        }
        bases: dict[str, Tensor] = {}
        for chunk in _chunks(groups, gram_bytes):
            sum_grams(model, chunk, batches)
            for number, group in enumerate(chunk):
                basis, facts, small = _solve(group, rank=rank, method=method, owner=number % dist.world_size())
                bases[group.name] = basis
                tensors |= {
                    f"{group.name}.basis": basis.cpu(),
                    f"{group.name}.eigenvalues": facts[2:].float().cpu(),
                    f"{group.name}.update_gram.{MIXTURE}": small.cpu(),
                }
                manifest["groups"][group.name] = {
                    "modules": list(group.modules),
                    "in_features": group.width,
                    "leak": {"calibration": float(facts[0]), "heldout": None, "random": float(facts[1])},
                }
                for name, linear in group.modules.items():
                    manifest["modules"][name] = {
                        "group": group.name,
                        "out_features": linear.out_features,
                        "mixed": a_init == "projected",
                        "has_start_b": False,
                        "references": {MIXTURE: float(group.outputs[name])},
                    }
        if a_init == "projected":
            tensors |= {f"{name}.mix": mix.cpu() for name, mix in _mixes(model, groups, bases, batches).items()}
    manifest["key"] = artifacts.hash_json(manifest)  # energies and leaks tell calibrations apart
    null_space = NullSpace(manifest=manifest, tensors=tensors if dist.is_main() else {})
    if folder is not None:
        with dist.together("writing the null space"):
            if dist.is_main():
                store.save(Path(folder), null_space)
    return null_space


def _chunks(groups: Sequence[Group], gram_bytes: float) -> Iterator[list[Group]]:
    """Groups in order, as many at once as have room."""
    chunk: list[Group] = []
    for group in groups:
        if chunk and sum(4.0 * g.width**2 for g in (*chunk, group)) > gram_bytes:
            yield chunk
            chunk = []
        chunk.append(group)
    if chunk:
        yield chunk


def _check_readable(linears: Mapping[str, nn.Linear]) -> None:
    """Refuses weights of whole numbers that nobody here can turn back, before a pass has been paid for."""
    for name, linear in linears.items():
        if not linear.weight.is_floating_point() and nf4.quant_state(linear) is None:
            raise UserError(
                f"calibrate: the weight of {name} is {str(linear.weight.dtype).removeprefix('torch.')} "
                f"({type(linear).__name__}), which a_init 'projected' cannot read; use a_init='orthonormal', which "
                "reads no weight, or a base in 4 bits"
            )


def _solve(group: Group, *, rank: int, method: Literal["fast", "eigh"], owner: int) -> tuple[Tensor, Tensor, Tensor]:
    """The group's basis (d_in, r), (leak, random leak, eigenvalues) and Uᵀ G U, found by ``owner`` and sent round."""
    assert group.gram is not None
    device = group.gram.device
    mirror(group.gram)
    sent = pack_triangle(group.gram)
    group.gram = None
    work = dist.start_reduce_to(sent, owner=owner)
    if work is not None:
        work.wait()
    basis = torch.zeros(group.width, rank, device=device)
    facts = torch.zeros(2 + rank, dtype=torch.float64, device=device)
    small = torch.zeros(rank, rank, device=device)
    if dist.rank() == owner:
        with exact(device):
            gram = unpack_triangle(sent)
            found = null_basis(gram, rank=rank, method=method)
            basis = found.basis.float().contiguous()
            exactly = gram_in_basis(gram, basis)
            facts[0], facts[1] = leak_of(exactly, gram), random_leak(gram, rank=rank, seed=0)
            facts[2:] = found.eigenvalues
            small = exactly.float()
    for tensor in (basis, facts, small):
        dist.broadcast(tensor, source=owner)
    return basis, facts, small


def _mixes(
    model: nn.Module, groups: Sequence[Group], bases: Mapping[str, Tensor], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """module → M (r, r) with A₀ = M Uᵀ, from weights read right before their products, where sharded ones are whole."""
    found: dict[str, Tensor] = {}

    def project(name: str, basis: Tensor) -> Any:
        def hook(module: nn.Linear, args: Any) -> None:
            with exact(basis.device):
                a, _ = projected_init(nf4.dense_weight(module), basis)
                found[name] = a.float() @ basis

        return hook

    hooks = [
        linear.register_forward_pre_hook(project(name, bases[group.name]))
        for group in groups
        for name, linear in group.modules.items()
    ]
    try:
        run_batch(model, first_batch(batches))
    finally:
        for handle in hooks:
            handle.remove()
    return found
