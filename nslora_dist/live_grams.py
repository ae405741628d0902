"""The forward passes of a live calibration: which linears read the same tensor, and the Grams of what they read."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nslora_dist import dist
from nslora_dist.adapter import energy_of
from nslora_dist.calibration.grams import add_gram
from nslora_dist.errors import UserError
from nslora_dist.live_model import exact

HELD_INPUTS = 8
"""Latest distinct inputs among which a linear's is looked for: a block's linears come close together."""


@dataclass
class Group:
    """Linears that read the same tensor, and what is summed over it (docs/methods.md §1.1, §1c).

    Attributes:
        modules: name in the bare Hugging Face model → the linear.
        width: d_in.
        gram: (d_in, d_in) float32 while its pass runs.
        energy: () float64 Σ‖x‖².
        outputs: module name → () float64 Σ‖W x‖².
    """

    modules: dict[str, nn.Linear]
    width: int
    gram: Tensor | None = None
    energy: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its first module's."""
        return next(iter(self.modules))


def run_batch(model: nn.Module, batch: Any) -> None:
    """One forward pass: of a mapping as keywords, of one tensor, alone or in a list.

    Raises:
        UserError: it is neither.
    """
    device = next(model.parameters()).device
    if isinstance(batch, list | tuple) and len(batch) == 1:
        (batch,) = batch  # as a DataLoader of a TensorDataset gives it
    if isinstance(batch, Mapping):
        model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    elif isinstance(batch, Tensor):
        model(batch.to(device))
    else:
        raise UserError(
            f"calibrate: a batch is a {type(batch).__name__}; wanted are mappings, whose items are the "
            "model's keywords, or single tensors"
        )


def first_batch(batches: Iterable[Any]) -> Any:
    """Raises a UserError where there is none."""
    for batch in batches:
        return batch
    raise UserError("calibrate: there are no batches")


def groups_of(model: nn.Module, linears: dict[str, nn.Linear], batches: Iterable[Any]) -> list[Group]:
    """Which linears are given the same values, seen in one forward pass.

    Told by address and not by object, for DeepSpeed hands every module a view of its own. An address means something
    only while the memory is held, and holding all inputs would cost as much as training: the latest few are held.
    """
    groups: list[Group] = []
    recent: OrderedDict[tuple[Any, ...], tuple[Tensor, Group]] = OrderedDict()

    def watch(name: str) -> Any:
        def hook(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            key = (x.data_ptr(), x.shape, x.stride(), x.dtype, 0 if x.is_inference() else x._version)
            if key in recent:
                recent[key][1].modules.setdefault(name, module)
                recent.move_to_end(key)
                return
            group = next((g for g in groups if name in g.modules), None)  # a module that runs twice keeps its group
            if group is None:
                group = Group({name: module}, module.in_features)
                groups.append(group)
            recent[key] = (x, group)
            if len(recent) > HELD_INPUTS:
                recent.popitem(last=False)

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    try:
        run_batch(model, first_batch(batches))
    finally:
        for handle in hooks:
            handle.remove()
    if not groups:
        raise UserError(
            f"calibrate: the first batch ran through none of the {len(linears)} linears chosen ({next(iter(linears))}, "
            "...); choose target_modules that the model's forward pass calls"
        )
    return groups


@contextmanager
def _hooked(groups: Sequence[Group], mask: list[Tensor | None]) -> Iterator[None]:
    """Sums inputs and products of the groups' linears while open; ``mask`` holds the current batch's."""

    def tokens(x: Tensor, name: str) -> Tensor:
        real, rows = mask[0], x.reshape(-1, x.shape[-1])
        if real is None:
            return rows
        if x.shape[:-1] in (real.shape, (real.numel(),)):  # (b, s, d), or (b * s, d) as in OPT
            return rows[real.flatten().to(x.device)]
        if x.shape[:-1] == real.T.shape:  # (s, b, d) as in XLNet
            return rows[real.T.flatten().to(x.device)]
        if x.dim() > 2 and not bool(real.all()):  # a pooled input, (b, d), holds no padding
            raise UserError(
                f"calibrate: {name} reads {tuple(x.shape)} where attention_mask is {tuple(real.shape)}, so which of "
                "its rows are padding is not known; give batches of texts of one length, or leave it out of "
                "target_modules"
            )
        return rows

    def take_input(group: Group) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = tokens(args[0].detach(), group.name)
            if group.gram is None:
                group.gram = torch.zeros(group.width, group.width, device=rows.device)
                group.energy = torch.zeros((), dtype=torch.float64, device=rows.device)
            with exact(rows.device):
                add_gram(group.gram, rows)
            group.energy += energy_of(rows)

        return hook

    def take_output(group: Group, name: str) -> tuple[Any, Any]:
        bias: list[Tensor] = []

        def before(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
            # Behind the product a sharded bias is released, and to read it would gather it for good.
            bias[:] = [] if module.bias is None else [module.bias.detach().clone()]

        def after(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            found = energy_of(tokens((output - bias[0] if bias else output).detach(), name))
            group.outputs[name] = group.outputs[name] + found if name in group.outputs else found

        return before, after

    hooks = []
    for group in groups:
        for number, (name, linear) in enumerate(group.modules.items()):
            if number == 0:
                hooks.append(linear.register_forward_pre_hook(take_input(group)))
            before, after = take_output(group, name)
            hooks += [linear.register_forward_pre_hook(before), linear.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def sum_grams(model: nn.Module, groups: Sequence[Group], batches: Iterable[Any]) -> None:
    """One pass over this rank's batches, then the scalars over all ranks."""
    mask: list[Tensor | None] = [None]
    with _hooked(groups, mask):
        for batch in batches:
            given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask[0] = given.bool() if isinstance(given, Tensor) and given.dim() == 2 else None
            run_batch(model, batch)
    for group in groups:
        scalars = dist.all_reduce(torch.stack([group.energy, *group.outputs.values()]))
        if not bool(scalars.isfinite().all()) or float(scalars[0]) == 0.0:
            raise UserError(
                f"calibrate: the inputs of {group.name} are {'zero' if float(scalars[0]) == 0.0 else 'not finite'}; "
                "check the batches and the model's dtype"
            )
        group.energy = scalars[0]
        group.outputs = dict(zip(group.outputs, scalars[1:], strict=True))
