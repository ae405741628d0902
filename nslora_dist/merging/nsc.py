"""Null-space compression: λ by gradient descent on the null-space ratio of unlabelled inputs (docs/methods.md §3)."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nslora_dist import dist, watch
from nslora_dist.errors import Preempted, UserError
from nslora_dist.merge_recipe import NscSection
from nslora_dist.merging.blocks import block_of, target_blocks
from nslora_dist.merging.inputs import TaskInputs
from nslora_dist.merging.merged_linear import MergedLinear, Pass
from nslora_dist.merging.model import MergedModel

log = logging.getLogger("nslora_dist")

FLAT_CONTRAST = 1e-3
"""Of ω under the others' A's over ω under a task's own, each relative to a random A: below it no task is told apart."""
STILL = 1e-5
"""A change of ω over the whole optimisation below this is none."""


@dataclass(frozen=True)
class NscResult:
    """What came out.

    Attributes:
        coefficients: λ by row (block or module) and task.
        unmoved: rows whose λ have no ω of a target behind them and keep their start.
        losses: one a step, mean ω over tasks and target modules, over all ranks' inputs.
        profile: task → block → ``before``, ``after``: mean ω under its own A on its own inputs, in the merged model.
        contrast: task → by how much ω under the other tasks' A's exceeds that under its own, before.
        movement: largest change of a task's ω in the target blocks.
        target_blocks: whose ω was minimised.
    """

    coefficients: dict[str, list[float]]
    unmoved: list[str]
    losses: list[float]
    profile: dict[str, dict[str, dict[str, float]]]
    contrast: dict[str, float | None]
    movement: float
    target_blocks: list[str]

    def flat(self, *, shared: bool) -> str | None:
        """Why the signal is flat, naming the alternative; None where it is not (docs/methods.md §3, limit)."""
        told = [abs(value) for value in self.contrast.values() if value is not None]
        if shared:
            why = "the adapters share A, so every ω is the same whichever adapter it is taken for"
        elif told and max(told) < FLAT_CONTRAST:
            why = "ω hardly differs between the adapters' A's, as where A was frozen or hardly trained"
        elif self.movement < STILL:
            why = "ω does not move with λ"
        else:
            return None
        return (
            f"the null-space signal is flat: {why}. Its λ mean little: use method gram, or arithmetic, which is exact "
            "at rank r for a shared A"
        )


def optimise(
    model: MergedModel,
    names: Sequence[str],
    inputs: Mapping[str, TaskInputs],
    section: NscSection,
    *,
    device: torch.device,
) -> NscResult:
    """Minimises the mean over tasks and target modules of ω on each task's inputs in the merged model; collective.

    λ of a module acts on the ω of the modules downstream of it alone. So those behind the last target (the last block's
    last linear, a pooler, a head) take no gradient and keep their start; with ``granularity: block`` they share the
    block's λ, which other modules of the block move.

    Every step takes ``batch_size`` inputs of each task, dealt over the ranks. Ranks exchange λ's gradient and nothing
    else, except for what sharding gathers: with the same inputs any number of ranks takes the same steps.

    Raises:
        UserError: ω or λ is no longer finite.
        Preempted: a rank was asked to stop.
    """
    targets = target_blocks(_ordered(model), section.target_fraction)
    for name, linear in model.linears.items():
        linear.is_target = block_of(name) in targets
    vision = any("pixel_values" in task.tensors for task in inputs.values())
    steps = section.steps or (100 if vision else 500)
    table = model.coefficients.table
    # No weight decay: a λ that no ω depends on is to keep its start.
    rate = section.learning_rate or (1e-3 if vision else 3e-4)
    optimizer = torch.optim.AdamW([table], lr=rate, weight_decay=0.0)
    model.root.eval()
    if section.activation_checkpointing:
        _checkpoint_activations(model.root)
    before = _measure(model, names, inputs, section.batch_size, device=device)
    start = table.detach().clone()
    reached = torch.zeros(len(table), dtype=torch.bool, device=device)
    orders = [_order(inputs[name].count, section, number) for number, name in enumerate(names)]
    losses = []
    for step in tqdm(range(steps), desc="nsc", disable=not dist.is_main(), mininterval=5.0):
        _begin(f"step {step + 1} of {steps}")
        optimizer.zero_grad(set_to_none=False)
        total = torch.zeros((), dtype=torch.float32, device=device)
        for number, name in enumerate(names):
            total += task_gradient(model, number, len(names), inputs[name], next(orders[number]), device=device)
        if table.grad is None:
            raise UserError("nsc: no λ acts on a target's ω; raise nsc.target_fraction")
        dist.all_reduce(table.grad)
        dist.all_reduce(total)
        losses.append(dist.numbers(total))
        if not bool(torch.isfinite(table.grad).all()):
            raise UserError(f"nsc: the gradient of λ is not finite in step {len(losses)}; use base_model.dtype=float32")
        reached |= (table.grad != 0).any(1)
        optimizer.step()
    after = _measure(model, names, inputs, section.batch_size, device=device)
    _forget(model)
    rows = model.coefficients.rows
    still = [row for row, number in rows.items() if not bool(reached[number])]
    assert torch.equal(table.detach()[~reached], start[~reached])
    if still:
        log.info(
            "nsc: λ of %d of %d %ss have no target downstream and stay", len(still), len(rows), section.granularity
        )
    own = [[_by_block(seen[k], k) for seen in (before, after)] for k in range(len(names))]
    return NscResult(
        coefficients={row: table[number].tolist() for row, number in rows.items()},
        unmoved=still,
        losses=losses,
        profile={
            name: {block: {"before": own[k][0][block], "after": own[k][1][block]} for block in own[k][0]}
            for k, name in enumerate(names)
        },
        contrast={name: _contrast(model, before[k], k, targets) for k, name in enumerate(names)},
        movement=max((abs(new[b] - old[b]) for old, new in own for b in old if b in targets), default=0.0),
        target_blocks=[block for block in dict.fromkeys(map(block_of, _ordered(model))) if block in targets],
    )


def _begin(what: str) -> None:
    """Another unit of work, before which all ranks stop where one was asked to; collective."""
    watch.progress(what)
    if dist.stopping():
        raise Preempted(f"nsc: stopped before {what}, as asked; nothing is written, the same command starts over")


def _ordered(model: MergedModel) -> list[str]:
    return [module.name for module in model.root.modules() if isinstance(module, MergedLinear)]


def task_gradient(
    model: MergedModel, number: int, tasks: int, inputs: TaskInputs, rows: Sequence[int], *, device: torch.device
) -> Tensor:
    """Adds one task's gradient to λ's; gives this rank's part of its share of the loss."""
    seen, output = _run(model, number, inputs, rows, device=device, every_task=False)
    if not seen.ratios:
        return torch.zeros((), device=device)  # an adapter without any module in the target blocks
    loss = torch.stack([ratio[number] for ratio in seen.ratios.values()]).mean() / tasks
    if loss.requires_grad:
        _Anchored.apply(loss, output).backward()
    return loss.detach()


class _Anchored(torch.autograd.Function):
    """The loss itself, with the model's output hung on to it by a gradient of zero.

    A sharded block gathers its weights for backward when a gradient reaches its *output*. ω is taken inside, and no
    loss lies behind the last block: without this its backward would start in the middle, on freed weights.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(output)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (output,) = ctx.saved_tensors
        return grad, torch.zeros_like(output)


def _run(
    model: MergedModel,
    number: int,
    inputs: TaskInputs,
    rows: Sequence[int],
    *,
    device: torch.device,
    every_task: bool,
) -> tuple[Pass, Tensor]:
    """Sends this rank's share of the inputs through the merged model; a rank without any runs one that counts 0.

    Returns:
        What the merged linears saw, and the model's output.
    """
    watch.progress(f"nsc, inputs of task {number + 1}")
    mine = list(rows[dist.rank() :: dist.world_size()])
    batch, mask = inputs.batch(mine or rows[:1])
    counts = torch.full((len(mine) or 1,), 1.0 if mine else 0.0, device=device)
    dtype = next(p.dtype for p in model.root.parameters() if p.is_floating_point())
    arguments: dict[str, Any] = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in batch.items()
    }
    current = Pass(
        task=number,
        rows=counts,
        mask=None if mask is None else mask.to(device) * counts[:, None],
        row_count=len(rows),
        token_count=inputs.tokens(rows),
        every_task=every_task,
    )
    for linear in model.linears.values():
        linear.current = current
    try:
        output = model.root(**arguments)[0]
    finally:
        if every_task:
            _forget(model)
    return current, output


def _forget(model: MergedModel) -> None:
    for linear in model.linears.values():
        linear.current = None


@torch.no_grad()
def _measure(
    model: MergedModel, names: Sequence[str], inputs: Mapping[str, TaskInputs], size: int, *, device: torch.device
) -> list[dict[str, dict[int, float]]]:
    """Task → module → task of the A → mean ω over all of the first task's inputs and all ranks."""
    found = []
    for number, name in enumerate(names):
        sums: dict[str, dict[int, Tensor]] = {}
        count = inputs[name].count
        for first in range(0, count, size):
            rows = list(range(first, min(first + size, count)))
            _begin(f"ω of {name}, inputs {first + 1} to {rows[-1] + 1} of {count}")
            seen, _ = _run(model, number, inputs[name], rows, device=device, every_task=True)
            for module, ratios in seen.ratios.items():
                mine = sums.setdefault(module, {})
                for task, value in ratios.items():
                    part = value.double() * len(rows) / count
                    mine[task] = mine[task] + part if task in mine else part
        flat = torch.stack([value for ratios in sums.values() for value in ratios.values()])
        dist.all_reduce(flat)
        values = iter(dist.numbers(flat))
        found.append({module: {task: next(values) for task in ratios} for module, ratios in sums.items()})
    return found


def _by_block(seen: Mapping[str, Mapping[int, float]], task: int) -> dict[str, float]:
    blocks: dict[str, list[float]] = {}
    for module, ratios in seen.items():
        if task in ratios:
            blocks.setdefault(block_of(module), []).append(ratios[task])
    return {block: sum(values) / len(values) for block, values in blocks.items()}


def _contrast(
    model: MergedModel, seen: Mapping[str, Mapping[int, float]], task: int, targets: set[str]
) -> float | None:
    """Mean over the target modules of ω under the other A's minus ω under the own one.

    Each counts over sqrt(1 − r/d_in), what a random A of its rank would have, so that a difference in rank is none.
    None where no target module has an A of this task and of another.
    """
    differences = []
    for module, ratios in seen.items():
        linear = model.linears[module]
        width = linear.in_features
        scaled = {
            other: value / (1 - (span[1] - span[0]) / width) ** 0.5
            for other, value in ratios.items()
            if (span := linear.spans[other])[1] - span[0] < width
        }
        others = [value for other, value in scaled.items() if other != task]
        if block_of(module) in targets and task in scaled and others:
            differences.append(sum(others) / len(others) - scaled[task])
    return sum(differences) / len(differences) if differences else None


def _order(count: int, section: NscSection, number: int) -> Iterator[list[int]]:
    """Batches of inputs without end, shuffled anew each time round; the same on every rank."""
    generator = torch.Generator().manual_seed(section.seed * 1000003 + number)
    waiting: list[int] = []
    size = min(section.batch_size, count)
    while True:
        if len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        batch, waiting = waiting[:size], waiting[size:]
        yield batch


def _checkpoint_activations(root: nn.Module) -> None:
    enable: Any = getattr(root, "gradient_checkpointing_enable", None)
    if enable is None:
        raise UserError("nsc.activation_checkpointing: this model has none; leave it out")
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in root.modules():
        if hasattr(module, "gradient_checkpointing"):
            # Only a layer that is in training mode checkpoints itself; what is inside stays without dropout.
            module.training = True
