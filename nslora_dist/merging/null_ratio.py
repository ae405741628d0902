"""The null-space ratio ω of an activation under an adapter's A, and its derivative (docs/methods.md §3.1)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DAMPING = 1e-8
"""Of A Aᵀ, relative to its mean diagonal: ω does not depend on the size of A."""


def whitening(lora_a: Tensor) -> Tensor:
    """L⁻¹ of A Aᵀ + damping = L Lᵀ, so that ‖L⁻¹ A x‖² = xᵀ Aᵀ (A Aᵀ)⁻¹ A x; Cholesky in float64.

    Args:
        lora_a: (r, d_in), any float dtype.

    Returns:
        (r, r) float64 lower triangle, on A's device.

    Raises:
        ValueError: A is zero.
    """
    a = lora_a.double()
    gram = a @ a.T
    size = gram.diagonal().mean()
    if not size > 0:
        raise ValueError("A is zero: it has no row space")
    lower = torch.linalg.cholesky(gram + DAMPING * size * torch.eye(len(gram), dtype=a.dtype, device=a.device))
    return torch.linalg.solve_triangular(lower, torch.eye(len(gram), dtype=a.dtype, device=a.device), upper=False)


def null_ratio(x: Tensor, z: Tensor, white: Tensor) -> Tensor:
    """ω = ‖Proj_null(A) x‖ / ‖x‖ = sqrt(1 − ‖L⁻¹ A x‖² / ‖x‖²), docs/methods.md §3.1.

    Kept for backward: x itself, not a copy, and tensors of z's size.

    Args:
        x: (..., d_in) activations.
        z: A x, (..., r): the product that the adapter needs anyway.
        white: L⁻¹ from ``whitening``.

    Returns:
        (...) in float32, float64 for float64 activations; 1 for a zero activation.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    inside = (z.to(dtype) @ white.to(z.device, dtype).T).square().sum(-1)
    energy = _Energy.apply(x).clamp_min(torch.finfo(dtype).tiny)
    # Where A reaches the whole activation the root's derivative is infinite: below rounding it counts as constant.
    return (1 - inside / energy).clamp_min(torch.finfo(dtype).eps ** 2).sqrt()


class _Energy(torch.autograd.Function):
    """‖x‖² of every row in at least float32, keeping x in its own dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (2 * grad[..., None]).to(x.dtype) * x


class _ScaleColumns(torch.autograd.Function):
    """z · λ, column by column; λ's gradient is summed in float32, for bfloat16 has 8 bits for a sum over tokens."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(z, columns)
        return z * columns.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, columns = ctx.saved_tensors
        grad_z = grad * columns.to(z.dtype) if ctx.needs_input_grad[0] else None
        wide = torch.promote_types(z.dtype, torch.float32)
        sums = (grad.to(wide) * z.to(wide)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_z, None if sums is None else sums.to(columns.dtype)


def scale_columns(z: Tensor, columns: Tensor) -> Tensor:
    """z (..., R) times λ of each column (R,), in z's dtype."""
    return _ScaleColumns.apply(z, columns)
