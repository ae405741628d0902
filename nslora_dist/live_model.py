"""What is asked of a Hugging Face model that somebody else built and maybe wrapped: its linears, and to keep still."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from nslora_dist.errors import UserError
from nslora_dist.explain import nearest

PEFT_PREFIX = "base_model.model."


def bare_name(name: str) -> str:
    """A module's name in the bare Hugging Face model, of its name in there or in PEFT's model around it."""
    return name.removeprefix(PEFT_PREFIX).removesuffix(".base_layer")


WRAPPED_AS = ("module", "_orig_mod")
"""Where DeepSpeed's engine and DistributedDataParallel, and ``torch.compile``, keep the model."""


def bare(model: nn.Module) -> nn.Module:
    """The model inside what it was wrapped in, once or several times."""
    while True:
        inner = next((m for m in (getattr(model, name, None) for name in WRAPPED_AS) if isinstance(m, nn.Module)), None)
        if inner is None:
            return model
        model = inner


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Without the caller's autocast, and without TF32 or bfloat16 inside float32 products: both would round Grams."""
    try:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # the caller has used PyTorch's newer settings, by backend, which this one cannot read
        before = None
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)


def linears_of(model: nn.Module, targets: Sequence[str] | None) -> dict[str, nn.Linear]:
    """The base's linears by their bare names; adapters' own are none.

    Raises:
        UserError: there are none, or none of a target's name.
    """
    inner = bare(model)
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    found = {
        bare_name(name): module
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name and "modules_to_save" not in name
    }
    others = {name: module for name, module in found.items() if module is not head}
    # GPT-2's layers are transformers' Conv1D, which keeps its weight the other way round.
    conv = any(type(module).__name__ == "Conv1D" for module in inner.modules())
    hint = "; its layers are Conv1D, which is not handled here" if conv else ""
    if targets is None:
        if not others:
            raise UserError(f"calibrate: {type(inner).__name__} has no nn.Linear besides an output embedding{hint}")
        return others
    if isinstance(targets, str):
        raise UserError(
            f"calibrate: target_modules '{targets}' is one text; give a list of last parts of names, or leave it out "
            "for every nn.Linear"
        )
    if not targets:
        raise UserError("calibrate: target_modules is empty; leave it out to calibrate every nn.Linear")
    known = sorted({name.rsplit(".", 1)[-1] for name in found})
    for target in targets:
        if target not in known:
            raise UserError(
                f"calibrate: the model has no linear '{target}'{nearest(target, known)}; "
                f"it has {', '.join(known) or 'none'}{hint}"
            )
    return {name: module for name, module in found.items() if name.rsplit(".", 1)[-1] in targets}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while open; then each module's own again, for a part may have been kept out of training."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])  # for a train() that does more than set the mode
        for module, training in modes:
            module.training = training
        # DeepSpeed leaves parameters in flight that it fetched for a pass which did not come.
        getattr(model, "empty_partition_cache", lambda: None)()
