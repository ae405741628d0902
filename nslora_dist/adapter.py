"""The adapted linear: a frozen base product plus a low-rank update, in delta and in residual form.

One module serves LoRA-Null and plain LoRA (docs/methods.md §1, §1a); Null-LoRA's is in ``null_lora``:

    delta     y = W x + s · B A x                 B from zero; A frozen in the null space, or trained (plain LoRA)
    residual  y = W x + s · (B A − B₀ A₀) x       LoRA-Null v1 (A trains) and v2 (A frozen), without rewriting W
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from nslora_dist.linear import LowRank, frozen_linear
from nslora_dist.null_space import interference


@dataclass
class Observation:
    """Sums over the tokens seen while adapters are measured, not applied (docs/methods.md §1c, by a forward pass).

    ``real`` are the rows and columns of the current batch's real tokens, None for all: no mask, which would be waited
    for on a GPU, at every module (``batches.Places``). ``update``, ``output`` and ``input`` map a
    module name to Σ‖ΔW x‖², Σ‖W x‖² and Σ‖x‖², float64 scalars on the module's device; ``grams`` to A G Aᵀ, (r, r)
    float64, or None where nobody wants it.
    """

    real: tuple[Tensor, Tensor] | None = None
    update: dict[str, Tensor] = field(default_factory=dict)
    output: dict[str, Tensor] = field(default_factory=dict)
    input: dict[str, Tensor] = field(default_factory=dict)
    grams: dict[str, Tensor] | None = None


class Adapter(nn.Module, ABC):
    """A frozen linear with a low-rank update: all that training, measuring and export know of every kind of adapter.

    A kind adds its parameters and ``low_rank``, the factors that it computes with.

    Attributes:
        base: the frozen linear.
        name: of the module it stands for in the Hugging Face model.
        scale: alpha / rank.
        exported_rank: rows of the A that its file will hold.
        lora_A: (·, d_in) trained or frozen down-projection.
        lora_B: (d_out, ·) trained up-projection.
        update_grams: name of a source or probe → C = A G Aᵀ (r, r) float32, for the live interference.
        references: name → tr(W G Wᵀ), the energy of the base's own output.
        interference: name → ‖ΔW X‖_F / ‖W X‖_F, written by a forward pass while ``measure`` is set.
    """

    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815

    def __init__(self, base: nn.Module, *, name: str, scale: float, exported_rank: int) -> None:
        """Takes the frozen linear into its place."""
        super().__init__()
        self.base = base
        self.name = name
        self.scale = scale
        self.exported_rank = exported_rank
        self.observation: Observation | None = None
        self.measure = False
        self.update_grams: dict[str, Tensor] = {}
        self.references: dict[str, float] = {}
        self.interference: dict[str, Tensor] = {}

    @staticmethod
    def empty(rows: int, columns: int, *, dtype: torch.dtype, trains: bool) -> nn.Parameter:
        """A parameter on the meta device, for ``assign`` to give it values."""
        return nn.Parameter(torch.empty(rows, columns, dtype=dtype, device="meta"), requires_grad=trains)

    def assign(self, values: Mapping[str, Tensor], *, device: torch.device) -> None:
        """Gives the named parameters their values, in their own dtype."""
        for name, value in values.items():
            old = getattr(self, name)
            assert value.shape == old.shape, f"{self.name}.{name}: {tuple(value.shape)} for {tuple(old.shape)}"
            # A copy of its own for each, or two parameters of residual form would share what the optimizer writes.
            value = value.to(device=device, dtype=old.dtype, copy=True).contiguous()
            setattr(self, name, nn.Parameter(value, requires_grad=old.requires_grad))

    @abstractmethod
    def low_rank(self, dtype: torch.dtype) -> LowRank:
        """The update's factors in the dtype of the activations."""

    def down(self, dtype: torch.dtype) -> Tensor:
        """The rows of the exported A, of rank 2r in residual form; whole inside a forward pass alone."""
        return self.low_rank(dtype).a

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) → (..., d_out), the base's dtype."""
        if self.observation is not None:
            return self._observe(self.observation, x)
        # The base adds the update to its own product: only inside its forward is its weight gathered.
        y: Tensor = self.base(x, update=self.low_rank(x.dtype))
        return y

    @torch.no_grad()
    def update(self, x: Tensor) -> Tensor:
        """ΔW x, (..., d_in) → (..., d_out), for measuring."""
        a, b, scale = self.low_rank(x.dtype)
        return scale * functional.linear(functional.linear(x, a), b)

    @torch.no_grad()
    def gram_of(self, x: Tensor, real: tuple[Tensor, Tensor] | None) -> Tensor:
        """Zᵀ Z of z = A x, (r, r) float64: a batch's part of C = A G Aᵀ; whole inside a forward pass alone.

        Args:
            x: (b, s, d_in).
            real: rows and columns of real tokens, each (n,) int64; None for all.
        """
        z = functional.linear(x, self.down(x.dtype)).float()
        z = z.flatten(0, -2) if real is None else z[real]
        return (z.T @ z).double()

    @torch.no_grad()
    def _observe(self, seen: Observation, x: Tensor) -> Tensor:
        products: list[Tensor] = []
        self.base.watch = products.append  # type: ignore[assignment]
        try:
            y: Tensor = self.base(x)
        finally:
            self.base.watch = None  # type: ignore[assignment]
        if seen.grams is not None:
            gram = self.gram_of(x, seen.real)
            seen.grams[self.name] = seen.grams[self.name] + gram if self.name in seen.grams else gram
        for sums, value in ((seen.update, self.update(x)), (seen.output, products[0]), (seen.input, x)):
            energy = energy_of(value, seen.real)
            sums[self.name] = sums[self.name] + energy if self.name in sums else energy
        return y


def energy_of(values: Tensor, real: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Σ‖v‖² over real tokens, () float64.

    A token's own sum is in float32, which no copy of the activations is made for; over tokens it is in float64.

    Args:
        values: (b, s, d), or rows (n, d) where all are real.
        real: rows and columns of real tokens, each (n,) int64; None for all.
    """
    norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
    return (norms if real is None else norms[real]).double().square().sum()


class AdaptedLinear(Adapter):
    """``base(x)`` plus the low-rank update of one module, in delta or residual form.

    Attributes:
        lora_A: (r, d_in) down-projection.
        lora_B: (d_out, r) up-projection, zero at the start in delta form, B₀ in residual form.
        start_A: (r, d_in) A₀, only in residual form with A trained.
        start_B: (d_out, r) B₀, only in residual form.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        name: str,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        freeze_a: bool,
        residual: bool,
        dtype: torch.dtype,
    ) -> None:
        """Builds the adapter on the meta device; ``fill`` gives it values."""
        super().__init__(base, name=name, scale=scale, exported_rank=2 * rank if residual else rank)
        self.residual = residual
        self.a_is_frozen = freeze_a
        self.lora_A = self.empty(rank, in_features, dtype=dtype, trains=not freeze_a)
        self.lora_B = self.empty(out_features, rank, dtype=dtype, trains=True)
        both = residual and not freeze_a
        self.start_A = self.empty(rank, in_features, dtype=dtype, trains=False) if both else None
        self.start_B = self.empty(out_features, rank, dtype=dtype, trains=False) if residual else None

    def fill(self, a: Tensor, b: Tensor | None, *, device: torch.device) -> None:
        """Gives the adapter its start: A = ``a`` (r, d_in); B = ``b`` (d_out, r) in residual form, else zero."""
        assert (b is not None) == self.residual, "B₀ belongs to the residual form"
        start = {"lora_A": a, "lora_B": b if b is not None else torch.zeros(self.lora_B.shape)}
        if self.start_A is not None:
            start["start_A"] = a
        if self.start_B is not None:
            assert b is not None
            start["start_B"] = b
        self.assign(start, device=device)

    def low_rank(self, dtype: torch.dtype) -> LowRank:
        """A and B as they are."""
        return LowRank(self.lora_A.to(dtype), self.lora_B.to(dtype), self.scale)

    def down(self, dtype: torch.dtype) -> Tensor:
        """A, or [A; A₀] in residual form."""
        if not self.residual:
            return self.lora_A.to(dtype)
        return torch.cat([self.lora_A, self.lora_A if self.start_A is None else self.start_A]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) → (..., d_out), the base's dtype."""
        if self.measure and self.observation is None:
            self._measure_interference()
        y = super().forward(x)
        return y if self.start_B is None or self.observation is not None else y - self._start(x)

    @torch.no_grad()
    def update(self, x: Tensor) -> Tensor:
        """ΔW x, (..., d_in) → (..., d_out), for measuring."""
        change = super().update(x)
        return change if self.start_B is None else change - self._start(x)

    def _start(self, x: Tensor) -> Tensor:
        """s · B₀ A₀ x, which the residual form takes off."""
        assert self.start_B is not None
        start_a = self.lora_A if self.start_A is None else self.start_A
        return self.scale * frozen_linear(frozen_linear(x, start_a.to(x.dtype), None), self.start_B.to(x.dtype), None)

    @torch.no_grad()
    def _measure_interference(self) -> None:
        """Interference per source and probe from the gathered B, r × r work a module (docs/methods.md §1c).

        A base that puts out nothing but zeros there leaves nothing to measure against, and no number.
        """
        b = self.lora_B.float()
        if self.start_B is not None:
            b = b - self.start_B.float()
        for name, gram in self.update_grams.items():
            if self.references[name] > 0:
                self.interference[name] = interference(gram, self.scale * b, self.references[name])


def adapted_linears(model: nn.Module) -> dict[str, Adapter]:
    """Every adapted linear of a model, by the name of the module it stands for in the Hugging Face model."""
    return {module.name: module for module in model.modules() if isinstance(module, Adapter)}


@contextmanager
def observed(model: nn.Module, seen: Observation) -> Iterator[None]:
    """While open, forward passes run the *base* and add to ``seen`` what the adapters would have added."""
    modules = adapted_linears(model).values()
    for module in modules:
        module.observation = seen
    try:
        yield
    finally:
        for module in modules:
            module.observation = None
