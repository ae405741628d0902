"""Null-LoRA: cross-frozen halves, the increment in the null space of the weight (docs/methods.md §2; arXiv 2512.15233).

    y = W x + s · (B̃ A_f + B_f Ã) x,   B̃ = U Uᵀ B,   Ã = A V Vᵀ

V (d_in × k_in) and U (d_out × k_out) span right and left null directions of W (`weight_null`). A_f and B_f, the first
h of them, are frozen; A (h × d_in) and B (d_out × h) train, both from zero: ΔW = 0 at the start, and no gradient is,
because the frozen halves are not. The trained parameters are those of a LoRA of rank h, the increment has rank 2h.

What the published text available to us leaves open, and the choice here:

- *How the null space is kept during training.* By the parametrisation: the forward pass uses the projections Ã and B̃,
  whatever an optimizer did to A and B. AdamW's step does not stay in a subspace even where the gradient does, so a
  projection of gradients or of the start alone would not do; and it works on shards, with no step after the optimizer.
- *How many directions count as null,* where the shape does not say: `adapter.null_threshold`, see `weight_null`.
- *The norm scaling.* The paper wants a scalar that keeps the two products in balance and calls it dynamic; ours is
  computed from the shape and constant. AdamW moves every entry of A and B about equally far, so ‖B̃‖_F : ‖Ã‖_F is
  about √d_out : √d_in, and with orthonormal frozen halves the products B̃A_f and B_fÃ differ by as much. Therefore
  A_f = (d_in/d_out)^¼ V_h ᵀ and B_f = (d_out/d_in)^¼ U_h, which makes both products of one size, and their mean that of
  unit factors. No scalar has to be trained, sharded or kept out of weight decay.
- *Which directions are frozen:* those with the smallest singular values; any, where the null space is structural.
- *The rank where a null space is small:* 2h ≤ min(k_in, k_out), more has no effect on ΔW; below 2 the module is left
  out.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nslora_dist.adapter import Adapter
from nslora_dist.linear import LowRank
from nslora_dist.weight_null import NullSizes


class _Confine(torch.autograd.Function):
    """Rows onto the span of orthonormal columns; saves the basis parameter itself, which an engine gathers again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        ctx.dtype = rows.dtype
        return _onto(rows, basis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (basis,) = ctx.saved_tensors
        return _onto(grad, basis).to(ctx.dtype), None  # a projection is its own transpose


def _onto(rows: Tensor, basis: Tensor) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    basis = basis.to(dtype)
    return (rows.to(dtype) @ basis) @ basis.T


def confined_factors(a: Tensor, b: Tensor, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """[A_f; Ã] and [B̃, B_f], whose product is ΔW before the scale (docs/methods.md §2.2, §2.3).

    Args:
        a: (h, d_in) trained.
        b: (d_out, h) trained.
        right: (d_in, k_in) V, orthonormal columns, k_in ≥ h.
        left: (d_out, k_out) U, likewise.

    Returns:
        (2h, d_in) and (d_out, 2h), computed in float32, or in float64 where a and b are.
    """
    half, balance = a.shape[0], (a.shape[1] / b.shape[0]) ** 0.25
    own_a, own_b = _Confine.apply(a, right), _Confine.apply(b.T, left).T
    frozen_a = right[:, :half].T.to(own_a.dtype) * balance
    frozen_b = left[:, :half].to(own_b.dtype) / balance
    return torch.cat([frozen_a, own_a]), torch.cat([own_b, frozen_b], dim=1)


class NullLoraLinear(Adapter):
    """``base(x)`` plus an increment in the null space of the base's weight.

    Attributes:
        lora_A: (h, d_in), trained; only its projection onto ``null_in`` counts.
        lora_B: (d_out, h), trained; only its projection onto ``null_out`` counts.
        null_in: (d_in, k_in) V, frozen.
        null_out: (d_out, k_out) U, frozen.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        name: str,
        in_features: int,
        out_features: int,
        sizes: NullSizes,
        scale: float,
        dtype: torch.dtype,
        basis_dtype: torch.dtype,
    ) -> None:
        """Builds the adapter on the meta device; ``basis_dtype`` is what the model computes in, on every engine."""
        super().__init__(base, name=name, scale=scale, exported_rank=sizes.rank)
        self.lora_A = self.empty(sizes.half, in_features, dtype=dtype, trains=True)
        self.lora_B = self.empty(out_features, sizes.half, dtype=dtype, trains=True)
        self.null_in = self.empty(in_features, sizes.right, dtype=basis_dtype, trains=False)
        self.null_out = self.empty(out_features, sizes.left, dtype=basis_dtype, trains=False)

    def fill(self, right: Tensor, left: Tensor, *, device: torch.device) -> None:
        """Gives the adapter its null spaces V (d_in, k_in) and U (d_out, k_out); A and B start at zero."""
        zero = {"lora_A": torch.zeros(self.lora_A.shape), "lora_B": torch.zeros(self.lora_B.shape)}
        self.assign({"null_in": right, "null_out": left} | zero, device=device)

    def low_rank(self, dtype: torch.dtype) -> LowRank:
        """The increment's factors: projected in float32, then rounded to the dtype of the activations."""
        a, b = confined_factors(self.lora_A, self.lora_B, self.null_in, self.null_out)
        return LowRank(a.to(dtype), b.to(dtype), self.scale)
