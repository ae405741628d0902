"""The Null-LoRA module: zero at the start, in the null space of its weight at every step (docs/methods.md §2)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nslora_dist.adapter import AdaptedLinear, Adapter
from nslora_dist.frozen import FrozenLinear
from nslora_dist.null_lora import NullLoraLinear, confined_factors
from nslora_dist.weight_null import NullSizes, weight_null_space

CPU = torch.device("cpu")
D_OUT, D_IN, RANK, DIM, THRESHOLD, SCALE = 64, 128, 8, 24, 0.45, 1.5
BASES = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frozen(dtype: torch.dtype, quantized: bool, d_out: int = D_OUT, d_in: int = D_IN) -> FrozenLinear:
    with torch.device("meta"):
        linear = nn.Linear(d_in, d_out, bias=False)
    base = FrozenLinear(linear, quantized=quantized, dtype=dtype)
    base.fill(base.pack(normal(d_out, d_in, seed=0).to(dtype) * 0.1), None)
    return base


class Made:
    """An adapter over a frozen linear, and the float64 singular vectors that its weight retains."""

    def __init__(
        self, dtype: torch.dtype, quantized: bool, *, rank: int = RANK, held: torch.dtype | None = None
    ) -> None:
        base = frozen(dtype, quantized)
        weight = base.dense(base.weight)
        found = weight_null_space(weight, dim=DIM, threshold=THRESHOLD)
        self.right, self.left = found.right.basis, found.left.basis
        self.sizes = NullSizes.fitted(rank, right=self.right.shape[1], left=self.left.shape[1])
        shape: dict[str, Any] = {"name": "m", "in_features": D_IN, "out_features": D_OUT, "scale": SCALE}
        self.module = NullLoraLinear(base, **shape, sizes=self.sizes, dtype=held or torch.float32, basis_dtype=dtype)
        self.module.fill(self.right, self.left, device=CPU)
        self.weight, self.dtype = weight, dtype

    def retained(self) -> tuple[Tensor, Tensor]:
        """(d_out, ·) P and (d_in, ·) Q: everything orthogonal to the null spaces."""
        return complement(self.left), complement(self.right)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        a, b, scale = self.module.low_rank(dtype or self.dtype)
        return scale * (b.detach().double() @ a.detach().double())


def complement(basis: Tensor) -> Tensor:
    return torch.linalg.svd(basis.double())[0][:, basis.shape[1] :]


def train(module: Adapter, dtype: torch.dtype, steps: int, after: Any = None) -> None:
    """AdamW on a regression to a random map; float32 masters of bfloat16 parameters, as engines keep them."""
    target, x = normal(D_OUT, D_IN, seed=7) * 0.1, normal(96, D_IN, seed=8)
    trained = [p for p in module.parameters() if p.requires_grad]
    masters = [p.detach().float().clone() for p in trained]
    optimizer = torch.optim.AdamW(masters, lr=2e-2, weight_decay=0.1)
    for _ in range(steps):
        loss = (module(x.to(dtype)).float() - x @ target.T).square().mean()
        loss.backward()
        for parameter, master in zip(trained, masters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(trained, masters, strict=True):
                parameter.copy_(master)
        if after is not None:
            after()


@pytest.mark.parametrize(("dtype", "quantized"), BASES)
def test_starts_as_the_base_itself_with_gradients_on_both_halves(dtype: torch.dtype, quantized: bool) -> None:
    made = Made(dtype, quantized)
    x = normal(5, 7, D_IN, seed=1).to(dtype)
    y = made.module(x)
    assert torch.equal(y, made.module.base(x)) and not made.dense().any()
    y.float().square().sum().backward()
    for parameter in (made.module.lora_A, made.module.lora_B):
        assert not parameter.any()
        assert parameter.grad is not None and (parameter.grad.flatten().abs() > 0).float().mean() > 0.9
    assert made.module.null_in.grad is None and made.module.null_out.grad is None


@pytest.mark.parametrize(("dtype", "quantized"), BASES)
def test_every_step_stays_in_the_null_space(dtype: torch.dtype, quantized: bool) -> None:
    """ΔW Q = 0 and Pᵀ ΔW = 0 for the retained singular vectors, relative to ‖ΔW‖.

    float32: the rounding of bases and factors, a few 1e-7. bfloat16: every entry of a factor and of a basis is rounded
    by up to 2⁻⁸, 1.6e-3 in the root mean square, independently in the three of a product: 2.8e-3 leave the null space.
    """
    made = Made(dtype, quantized, held=dtype)
    p, q = made.retained()
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    outside: list[float] = []

    def check() -> None:
        update = made.dense()
        size = float(update.norm())
        assert size > 0
        assert float((update @ q).norm()) < tolerance * size
        assert float((p.T @ update).norm()) < tolerance * size
        a = made.module.lora_A.detach().double()
        outside.append(float((a @ q).norm() / a.norm()))

    train(made.module, dtype, 25, check)
    assert min(outside) > 0.05, "the optimizer stayed in the null space by itself, so nothing was shown"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_factors_are_exact_whatever_the_training_dtype(dtype: torch.dtype) -> None:
    """Projected once more in float64 onto the float32 bases: 1e-6 from parameters of 8 bits, too; the same update."""
    made = Made(dtype, False, held=dtype)
    train(made.module, dtype, 5)
    module = made.module
    a, b = confined_factors(module.lora_A.detach().double(), module.lora_B.detach().double(), made.right, made.left)
    update = SCALE * b.float().double() @ a.float().double()
    p, q = made.retained()
    assert (update @ q).norm() < 1e-6 * update.norm() and (p.T @ update).norm() < 1e-6 * update.norm()
    live = made.dense()
    assert (update - live).norm() < (1e-6 if dtype == torch.float32 else 2**-7) * live.norm()


def test_more_rank_than_a_lora_of_as_many_parameters() -> None:
    """2h against h, and as an effective rank (exp of the entropy of the squared singular values)."""

    def effective(update: Tensor) -> float:
        share = torch.linalg.svdvals(update).square()
        share = share / share.sum()
        return float(torch.exp(-(share * share.clamp_min(1e-30).log()).sum()))

    made = Made(torch.float32, False)
    half = made.sizes.half
    assert made.sizes.rank == RANK == 2 * half
    lora = AdaptedLinear(
        frozen(torch.float32, False),
        name="l",
        in_features=D_IN,
        out_features=D_OUT,
        rank=half,
        scale=SCALE,
        freeze_a=False,
        residual=False,
        dtype=torch.float32,
    )
    lora.fill(normal(half, D_IN, seed=3) / D_IN**0.5, None, device=CPU)
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (made.module, lora)]
    assert counts[0] == counts[1] == half * (D_IN + D_OUT)
    for module in (made.module, lora):
        train(module, torch.float32, 40)
    update = made.dense()
    other = SCALE * lora.lora_B.detach().double() @ lora.lora_A.detach().double()
    assert int((torch.linalg.svdvals(update) > 1e-4 * torch.linalg.matrix_norm(update, 2)).sum()) == RANK
    assert int((torch.linalg.svdvals(other) > 1e-6 * torch.linalg.matrix_norm(other, 2)).sum()) == half
    assert effective(update) > 1.2 * effective(other)
    assert effective(update) > half, "more than a LoRA of as many parameters could have at all"


def test_norm_scaling_balances_the_two_products() -> None:
    """After AdamW steps B̃A_f and B_fÃ are of one size; unit frozen halves would set them √(d_in/d_out) = 1.41 apart."""
    made = Made(torch.float32, False)
    train(made.module, torch.float32, 1)
    a, b, _ = made.module.low_rank(torch.float32)
    half = made.sizes.half
    sizes = [float((b[:, part] @ a[part]).detach().norm()) for part in (slice(half), slice(half, None))]
    frozen_norms = [a[:half].norm(dim=1), b[:, half:].norm(dim=0)]
    torch.testing.assert_close(frozen_norms[0], torch.full((half,), 2**0.25), rtol=1e-5, atol=0)
    torch.testing.assert_close(frozen_norms[1], torch.full((half,), 2**-0.25), rtol=1e-5, atol=0)
    assert 1 / 1.2 < sizes[0] / sizes[1] < 1.2


def test_gradients_are_those_of_the_formula() -> None:
    """Against finite differences, in float64; the bases take none."""
    right, left = (torch.linalg.qr(normal(n, 5, seed=n).double())[0] for n in (9, 7))
    a, b = (normal(*shape, seed=4).double().requires_grad_() for shape in ((2, 9), (7, 2)))
    assert torch.autograd.gradcheck(lambda a, b: confined_factors(a, b, right, left), (a, b))


def test_forward_and_measuring_agree_with_the_dense_update() -> None:
    made = Made(torch.float32, False)
    train(made.module, torch.float32, 3)
    x = normal(11, D_IN, seed=2)
    update = made.dense().float()
    torch.testing.assert_close(made.module(x), x @ (made.weight + update).T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.module.update(x), x @ update.T, atol=1e-5, rtol=1e-4)
