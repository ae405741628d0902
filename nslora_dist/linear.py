"""Products with frozen weights, that keep nothing for backward which they do not need.

``torch.nn.functional.linear`` saves a transposed *view* of its weight. Under ZeRO-3, where a gathered weight is freed
by swapping the parameter's data, that view would keep every gathered weight alive until backward. These functions save
the parameter object itself, whose data the engine gathers again before the backward pass, and never the inputs of a
weight that takes no gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Unpack = Callable[[Tensor], Tensor]

HEAD_CHUNK_BYTES = 256 * 2**20
"""Float32 logits of a 128k vocabulary that exist at once in ``head_loss``: 524 tokens of them."""


class LowRank(NamedTuple):
    """An update scale · B A, in the dtype of the activations.

    Attributes:
        a: (r, d_in) down-projection.
        b: (d_out, r) up-projection.
        scale: alpha / rank.
    """

    a: Tensor
    b: Tensor
    scale: float


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, past ``functional.linear``, which DeepSpeed, where it is let, replaces in the whole process."""
    rows = x.flatten(0, -2)
    y = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
    return y.unflatten(0, x.shape[:-1])


class _FrozenLinear(torch.autograd.Function):
    """x Wᵀ + bias + scale · x Aᵀ Bᵀ with W frozen; A and B may take gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        unpack: Unpack | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.unpack, ctx.scale = unpack, scale
        y = _product(x, weight if unpack is None else unpack(weight), bias)
        if a is None or b is None:
            ctx.save_for_backward(weight, None, None, None, None)
            return y
        z = _product(x, a, None)
        # In place on the product: an update of its own would be written to memory and read again.
        y.flatten(0, -2).addmm_(z.flatten(0, -2), b.T, alpha=scale)
        ctx.save_for_backward(weight, a, b, z, x if ctx.needs_input_grad[4] else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, z, x = ctx.saved_tensors
        shape, grad = grad.shape, grad.flatten(0, -2)
        needs_x = ctx.needs_input_grad[0]
        grad_x = grad @ (weight if ctx.unpack is None else ctx.unpack(weight)) if needs_x else None
        grad_a = grad_b = None
        if a is not None:
            grad_z = grad @ b
            if ctx.scale != 1.0:
                grad_z *= ctx.scale
            if grad_x is not None:
                grad_x.addmm_(grad_z, a)
            if ctx.needs_input_grad[4]:
                grad_a = grad_z.T @ x.flatten(0, -2)
            if ctx.needs_input_grad[5]:
                grad_b = grad.T @ z.flatten(0, -2)
                if ctx.scale != 1.0:
                    grad_b *= ctx.scale
        if grad_x is not None:
            grad_x = grad_x.unflatten(0, shape[:-1])
        return grad_x, None, None, None, grad_a, grad_b, None


def frozen_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, unpack: Unpack | None = None, update: LowRank | None = None
) -> Tensor:
    """x Wᵀ + bias, plus a low-rank update, for a weight and bias without gradient.

    Kept for backward: the weight's parameter object, A, B and z = A x (..., r); x only where A takes a gradient.

    Args:
        x: (..., d_in) activations, at least two-dimensional.
        weight: (d_out, d_in), or whatever ``unpack`` turns into that: a 4-bit weight is unpacked once more in the
            backward pass instead of being kept.
        bias: (d_out,) or None.
        unpack: from the stored to the dense weight.
        update: added to the product.

    Returns:
        (..., d_out), x's dtype.
    """
    a, b, scale = update if update is not None else (None, None, 1.0)
    return _FrozenLinear.apply(x, weight, bias, unpack, a, b, scale)


class _HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of a frozen head; its input gradient is made in forward, chunk by chunk of tokens."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if wanted else None
        step = max(1, HEAD_CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(hidden), step):
            # float32, because bfloat16 has 8 bits for a sum over the vocabulary.
            logits = functional.linear(hidden[start : start + step], weight).float()
            chosen = labels[start : start + step, None]
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(-1, chosen)).sum()
            if grad is not None:
                slope = logits.sub_(log_sum).exp_()
                slope.scatter_add_(-1, chosen, torch.full_like(log_sum, -1.0))
                grad[start : start + step] = slope.to(hidden.dtype) @ weight
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (slope,) = ctx.saved_tensors
        return (None if slope is None else slope * grad.to(slope.dtype)), None, None


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Σ −log softmax(W h)[label] for a frozen head W, with a bounded number of logits in memory.

    Args:
        hidden: (n, d) of the supervised tokens.
        weight: (vocabulary, d) without gradient.
        labels: (n,) int64.

    Returns:
        () float32, the sum over tokens.
    """
    return _HeadLoss.apply(hidden, weight, labels)


def head_scores(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Each label's log softmax(W h), and whether it is the most likely, with as few logits in memory as ``head_loss``.

    Args:
        hidden: (n, d).
        weight: (vocabulary, d).
        labels: (n,) int64.

    Returns:
        (n, 2) float32, the second column 0 or 1.
    """
    found = torch.empty(len(labels), 2, dtype=torch.float32, device=hidden.device)
    step = max(1, HEAD_CHUNK_BYTES // (4 * weight.shape[0]))
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        logits = functional.linear(hidden[part], weight).float()
        found[part, 0] = logits.gather(-1, labels[part, None])[:, 0] - logits.logsumexp(-1)
        found[part, 1] = (logits.argmax(-1) == labels[part]).float()
    return found


def head_divergence(hidden: Tensor, against: Tensor, weight: Tensor) -> Tensor:
    """KL(softmax(W g) ‖ softmax(W h)) of each token, with as few logits in memory as ``head_loss``.

    Args:
        hidden: h, (n, d).
        against: g, (n, d).
        weight: (vocabulary, d).

    Returns:
        (n,) float32, in nats; two roundings of the same h are about 1e-7 apart, or 1e-4 where h is bfloat16.
    """
    found = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    step = max(1, HEAD_CHUNK_BYTES // (8 * weight.shape[0]))
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        wanted = functional.linear(against[part], weight).float().log_softmax(-1)
        given = functional.linear(hidden[part], weight).float().log_softmax(-1)
        found[part] = (wanted.exp() * (wanted - given)).sum(-1)
    return found
