"""The merged linear of null-space compression: W x + Σ_k λ_k B_k A_k x, every factor kept (docs/methods.md §3.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nslora_dist.export import Factors
from nslora_dist.linear import frozen_linear
from nslora_dist.merging.null_ratio import null_ratio, scale_columns, whitening


class Coefficients:
    """All λ: one row a block or a module, one column a task.

    No module holds them, so that sharding a model leaves them whole.
    """

    def __init__(self, rows: Sequence[str], initial: Sequence[float], *, device: torch.device) -> None:
        """Starts every row at ``initial``, one value a task."""
        self.rows = {name: number for number, name in enumerate(rows)}
        table = torch.tensor(initial, dtype=torch.float32, device=device).repeat(len(rows), 1)
        self.table = table.requires_grad_()

    def columns(self, row: str, owner: Tensor) -> Tensor:
        """(R,): the λ of each column's task."""
        return self.table[self.rows[row]][owner]


@dataclass
class Pass:
    """One task's inputs on their way through the merged model, and what the merged linears saw of them.

    Attributes:
        task: its number.
        rows: (b,) weights of this rank's inputs: 0 for one that only keeps the rank in step.
        mask: (b, s) weights of their tokens, or None where all inputs are of one length.
        row_count: inputs over all ranks.
        token_count: Σ mask over all ranks.
        every_task: whether ω is taken under every task's A and in every module, without gradient.
        ratios: module → task number → Σ over this rank's positions of weight · ω / weights over all ranks.
    """

    task: int
    rows: Tensor
    mask: Tensor | None
    row_count: int
    token_count: int
    every_task: bool = False
    ratios: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def weights(self, x: Tensor) -> Tensor:
        """What each position of x (..., d) counts, summing to 1 over the ranks: real tokens evenly, else inputs."""
        shape = x.shape[:-1]
        if self.mask is not None and shape.numel() == self.mask.numel():
            return self.mask.view(shape) / self.token_count
        per_row = shape.numel() // len(self.rows)  # patches, windows, or one pooled vector an input
        return self.rows.repeat_interleave(per_row).view(shape) / (self.row_count * per_row)


class MergedLinear(nn.Module):
    """A frozen linear with all tasks' updates on it; only λ takes a gradient.

    Kept for backward: z = [A₁; …; A_K] x, (tokens, Σ r_k), and x itself where ω is measured.

    Attributes:
        base: the frozen linear.
        lora_A: (Σ r_k, d_in), stacked.
        lora_B: (d_out, Σ r_k), side by side, scales in it.
        spans: task number → its columns, for the tasks that adapt this module.
        row: its row of the coefficients.
        is_target: whether its ω enter the loss.
        current: the pass under way, None while nothing is recorded.
    """

    def __init__(
        self, base: nn.Module, *, name: str, row: str, updates: Mapping[int, Factors], coefficients: Coefficients
    ) -> None:
        """Takes the factors on their final device and in the compute dtype.

        Raises:
            ValueError: an A is zero.
        """
        super().__init__()
        self.base, self.name, self.row, self.coefficients = base, name, row, coefficients
        pairs = list(updates.values())
        self.in_features, self.out_features = pairs[0].lora_a.shape[1], pairs[0].lora_b.shape[0]
        self.lora_A = nn.Parameter(torch.cat([pair.lora_a for pair in pairs]), requires_grad=False)
        self.lora_B = nn.Parameter(torch.cat([pair.lora_b for pair in pairs], dim=1), requires_grad=False)
        ranks = torch.tensor([pair.rank for pair in pairs])
        ends = ranks.cumsum(0).tolist()
        self.spans = {k: (end - int(r), end) for k, end, r in zip(updates, ends, ranks, strict=True)}
        self.owner = torch.repeat_interleave(torch.tensor(list(updates)), ranks).to(self.lora_A.device)
        self.white = {k: whitening(pair.lora_a) for k, pair in updates.items()}
        self.is_target = False
        self.current: Pass | None = None

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models look at its dtype."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) → (..., d_out), the base's dtype."""
        z = frozen_linear(x, self.lora_A, None)
        if self.current is not None:
            self._record(self.current, x, z)
        scaled = scale_columns(z, self.coefficients.columns(self.row, self.owner))
        return self.base(x) + frozen_linear(scaled, self.lora_B, None)

    def _record(self, current: Pass, x: Tensor, z: Tensor) -> None:
        if not current.every_task and not (self.is_target and current.task in self.spans):
            return
        weights = current.weights(x)
        for task in self.spans if current.every_task else [current.task]:
            start, end = self.spans[task]
            mean = (null_ratio(x, z[..., start:end], self.white[task]) * weights).sum()
            seen = current.ratios.setdefault(self.name, {})
            # Activation checkpointing runs a module again in the backward pass: the first run's value is the loss's.
            seen.setdefault(task, mean)
