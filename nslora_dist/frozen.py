"""The base's own modules, without gradient: linears, dense or in 4 bits, and the output head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nslora_dist import nf4
from nslora_dist.linear import LowRank, frozen_linear, head_divergence, head_loss, head_scores


class FrozenLinear(nn.Module):
    """A linear without gradient, dense or packed to 4 bits; it keeps no activations for backward.

    ``watch``, where set, is given every product W x before bias and update are added: only inside this module's own
    forward pass is a sharded bias whole, and taking one off again afterwards would cost digits.
    """

    def __init__(self, linear: nn.Linear, *, quantized: bool, dtype: torch.dtype) -> None:
        """Takes the shape of ``linear`` on the meta device; ``fill`` gives it values."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quantized = quantized
        self.dtype = dtype
        self.quant_state: Any = None
        self.watch: Callable[[Tensor], None] | None = None
        shape: tuple[int, ...] = (self.out_features, self.in_features)
        if quantized:
            # Two values a byte, stored as the base's dtype: ZeRO-3 gathers one dtype at a time (FSDP2: ``keep_bytes``).
            shape = (self.out_features * self.in_features // 2 // dtype.itemsize, 1)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        self.bias = None
        if linear.bias is not None:
            empty = torch.empty(self.out_features, dtype=dtype, device="meta")
            self.bias = nn.Parameter(empty, requires_grad=False)

    def pack(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What is kept of (n, d_in) rows of the weight: themselves, or their 4-bit codes and scales, by row."""
        return nf4.pack_rows(rows) if self.quantized else (rows,)

    def fill(self, parts: tuple[Tensor, ...], bias: Tensor | None) -> None:
        """Takes ``pack``'s parts of all rows, and the (d_out,) bias, on their final device."""
        if self.quantized:
            weight, self.quant_state = nf4.assemble(*parts, dtype=self.dtype)
        else:
            (weight,) = parts
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def dense(self, weight: Tensor) -> Tensor:
        """The stored (gathered) weight as (d_out, d_in) in the base's dtype; no copy if it is dense already."""
        if not self.quantized:
            return weight
        return nf4.unpack(weight.data, self.quant_state)

    def forward(self, x: Tensor, *, update: LowRank | None = None) -> Tensor:
        """(..., d_in) → (..., d_out), an adapter's update added."""
        unpack = self.dense if self.quantized else None
        if self.watch is not None:
            product = frozen_linear(x, self.weight, None, unpack=unpack)
            self.watch(product)
            if update is None:
                return product if self.bias is None else product + self.bias
        return frozen_linear(x, self.weight, self.bias, unpack=unpack, update=update)


def keep_bytes(unit: nn.Module) -> None:
    """Stores the unit's filled 4-bit weights, (n, 1) in the base's dtype, as the same n rows of uint8.

    On CUDA FSDP2 copies what it gathers with ``torch._foreach_copy_``, which takes bfloat16 numbers through float32 and
    back, where every NaN becomes one and the same: codes that spell one would arrive as others. A group with bytes in
    it is copied as bytes.
    """
    for module in unit.modules():
        if isinstance(module, FrozenLinear) and module.quantized:
            module.weight = nn.Parameter(module.weight.detach().view(torch.uint8), requires_grad=False)


class FrozenHead(nn.Module):
    """The output head without gradient: a summed loss where labels are given, logits otherwise."""

    def __init__(self, weight: nn.Parameter) -> None:
        """Takes the head's (vocabulary, d) weight, tied or not."""
        super().__init__()
        self.weight = weight

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *,
        by_token: bool = False,
        against: Tensor | None = None,
    ) -> Tensor:
        """(n, d) → () float32 Σ −log p(label), or ``head_scores`` of each, or (n, vocabulary) logits without labels.

        With other hidden states ``against`` (n, d): ``head_divergence``.
        """
        if against is not None:
            return head_divergence(hidden, against, self.weight)
        if labels is None:
            return nn.functional.linear(hidden, self.weight)
        if by_token:
            return head_scores(hidden, self.weight, labels)
        return head_loss(hidden, self.weight, labels)


class PassThrough(nn.Module):
    """Stands in for a decoder block that is not to run."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """Returns its input."""
        return hidden_states
