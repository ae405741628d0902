"""The Grams of a live model's plain forward passes, whole or sharded: what the streamed pass is held against."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nslora_dist.batches import Batch, Places
from nslora_dist.frozen import FrozenLinear
from nslora_dist.input_groups import InputGroup


@torch.no_grad()
def whole_model_grams(
    model: nn.Module, forward: Callable[[Batch], object], groups: Sequence[InputGroup], batches: Iterable[Batch]
) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Group → its Gram X Xᵀ (d_in, d_in) and, by module, Σ‖W x‖² without a bias: this rank's sums, float64.

    Args:
        model: where the groups' modules are found by name; plain linears, frozen ones or adapted ones.
        forward: runs one batch through the model.
        groups: what to collect.
        batches: this rank's share; a sharded model needs the same number on every rank.
    """
    grams = {g.name: torch.zeros(g.in_features, g.in_features, dtype=torch.float64) for g in groups}
    energies = {m.name: torch.zeros((), dtype=torch.float64) for group in groups for m in group.modules}
    real: list[Places] = []

    def watch_input(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0][real[0]].double()
            grams[name] += x.T @ x

        return hook

    def watch_product(name: str) -> Callable[[Tensor], None]:
        def add(product: Tensor) -> None:
            energies[name] += product[real[0]].double().square().sum()

        return add

    def without_bias(add: Callable[[Tensor], None]) -> Any:
        def hook(module: nn.Linear, args: object, output: Tensor) -> None:
            add(output if module.bias is None else output - module.bias)

        return hook

    with ExitStack() as opened:
        for group in groups:
            first = model.get_submodule(group.modules[0].name)
            opened.callback(first.register_forward_pre_hook(watch_input(group.name)).remove)
            for shape in group.modules:
                module = model.get_submodule(shape.name)
                linear = getattr(module, "base", module)  # of an adapted linear, the base's own
                if isinstance(linear, FrozenLinear):
                    linear.watch = watch_product(shape.name)
                    opened.callback(setattr, linear, "watch", None)
                else:
                    hook = without_bias(watch_product(shape.name))
                    opened.callback(linear.register_forward_hook(hook).remove)
        for batch in batches:
            real[:] = [batch.real_tokens]
            forward(batch)
    return {g.name: (grams[g.name], {m.name: energies[m.name] for m in g.modules}) for g in groups}
