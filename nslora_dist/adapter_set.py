"""Several finished adapters side by side on one frozen linear, of which one at a time is at work.

To compare adapters the base is then loaded and sharded once, whatever the engine.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nslora_dist.adapter import Adapter
from nslora_dist.linear import LowRank


class AdapterSet(Adapter):
    """``base(x) + s_k · B_k A_k x`` of the adapter k at work, ``base(x)`` while none of its own is.

    Attributes:
        lora_A: (Σ r_k, d_in), the down-projections one above the other.
        lora_B: (d_out, Σ r_k), the up-projections side by side.
        spans: adapter → its first row of ``lora_A`` and the one after its last; adapters without this module are not
            in it.
        scales: adapter → s_k.
        at_work: the adapter's name; None, or one that is not in ``spans``, leaves the base alone.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        name: str,
        in_features: int,
        out_features: int,
        ranks: Mapping[str, int],
        scales: Mapping[str, float],
        dtype: torch.dtype,
    ) -> None:
        """Builds the set on the meta device; ``fill`` gives it values."""
        super().__init__(base, name=name, scale=1.0, exported_rank=sum(ranks.values()))
        self.scales = dict(scales)
        self.spans: dict[str, tuple[int, int]] = {}
        total = 0
        for adapter, rank in ranks.items():
            self.spans[adapter] = (total, total + rank)
            total += rank
        self.at_work: str | None = None
        self.lora_A = self.empty(total, in_features, dtype=dtype, trains=False)
        # Nothing is ever trained here, but an engine's optimizer wants a parameter.
        self.lora_B = self.empty(out_features, total, dtype=dtype, trains=True)

    def fill(self, factors: Mapping[str, tuple[Tensor, Tensor]], *, device: torch.device) -> None:
        """Gives the set its values: adapter → A_k (r_k, d_in) and B_k (d_out, r_k)."""
        a = torch.cat([factors[adapter][0] for adapter in self.spans])
        b = torch.cat([factors[adapter][1] for adapter in self.spans], dim=1)
        self.assign({"lora_A": a, "lora_B": b}, device=device)

    def low_rank(self, dtype: torch.dtype) -> LowRank:
        """The factors of the adapter at work, of rank 0 while none is."""
        first, last = self.spans.get(self.at_work or "", (0, 0))
        scale = self.scales.get(self.at_work or "", 1.0)
        return LowRank(self.lora_A[first:last].to(dtype), self.lora_B[:, first:last].to(dtype), scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) → (..., d_out), the base's dtype."""
        if self.observation is None and self.at_work not in self.spans:
            y: Tensor = self.base(x)
            return y
        return super().forward(x)


def put_to_work(model: nn.Module, adapter: str | None) -> None:
    """Lets one adapter of every set work; None the base alone."""
    for module in model.modules():
        if isinstance(module, AdapterSet):
            module.at_work = adapter
