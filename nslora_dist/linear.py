"""Frozen and low-rank products that keep nothing for backward which they do not need.

``torch.nn.functional.linear`` saves a transposed *view* of its weight. Under ZeRO-3, where a gathered weight is freed
by swapping the parameter's data, that view would keep every gathered weight alive until backward. These functions save
the parameter object itself, whose data the engine gathers again before the backward pass, and never the inputs of a
weight that takes no gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Unpack = Callable[[Tensor], Tensor]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, unpack: Unpack | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.unpack = unpack
        dense = weight if unpack is None else unpack(weight)
        return torch.nn.functional.linear(x, dense, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (weight,) = ctx.saved_tensors
        dense = weight if ctx.unpack is None else ctx.unpack(weight)
        return grad @ dense, None, None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, unpack: Unpack | None = None) -> Tensor:
    """x Wᵀ + bias for a weight without gradient.

    Args:
        x: (..., d_in) activations.
        weight: (d_out, d_in), or whatever ``unpack`` turns into that: a 4-bit weight is unpacked once more in the
            backward pass instead of being kept.
        bias: (d_out,) or None.
        unpack: from the stored to the dense weight.

    Returns:
        (..., d_out), x's dtype.
    """
    return _FrozenLinear.apply(x, weight, bias, unpack)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        z = torch.nn.functional.linear(x, a)
        ctx.save_for_backward(z, a, b, x if ctx.needs_input_grad[1] else None)
        ctx.scale = scale
        return torch.nn.functional.linear(z, b).mul_(scale) if scale != 1.0 else torch.nn.functional.linear(z, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        z, a, b, x = ctx.saved_tensors
        if ctx.scale != 1.0:
            grad = grad * ctx.scale
        grad_z = grad @ b
        grad_x = grad_z @ a if ctx.needs_input_grad[0] else None
        grad_a = grad_z.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        grad_b = grad.flatten(0, -2).T @ z.flatten(0, -2) if ctx.needs_input_grad[2] else None
        return grad_x, grad_a, grad_b, None


def low_rank(x: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """scale · B A x. Keeps (..., r) for backward, and x only where A takes a gradient.

    Args:
        x: (..., d_in) activations.
        a: (r, d_in) down-projection, x's dtype.
        b: (d_out, r) up-projection, x's dtype.
        scale: alpha / rank.

    Returns:
        (..., d_out), x's dtype.
    """
    return _LowRank.apply(x, a, b, scale)
