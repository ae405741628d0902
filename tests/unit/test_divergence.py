"""The divergence of two heads' outputs, the energies beside it, and what the report makes of them."""

import pytest
import torch
from torch import nn

from nslora_dist import linear
from nslora_dist.adapter import energy_of
from nslora_dist.calibration_data import CalibrationTexts
from nslora_dist.card import interference_tables
from nslora_dist.effects import summarise
from nslora_dist.frozen import FrozenHead


@pytest.mark.parametrize("chunk", [8, 8 * 40 * 3, 2**30])
def test_is_the_kl_of_the_next_token(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """In chunks of one token, of three, and of all; float32 rounds a log-probability to 1e-6 here."""
    monkeypatch.setattr(linear, "HEAD_CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(0)
    base, moved = torch.randn(2, 7, 16, generator=generator)
    head = FrozenHead(nn.Parameter(torch.randn(40, 16, generator=generator), requires_grad=False))
    wanted, given = ((hidden.double() @ head.weight.double().T).log_softmax(-1) for hidden in (base, moved))
    expected = nn.functional.kl_div(given, wanted, log_target=True, reduction="none").sum(-1)
    assert head(moved, against=base).double() == pytest.approx(expected, rel=1e-5)
    assert head(base, against=base).abs().max() == 0
    assert head(base[:0], against=base[:0]).shape == (0,)
    # The order is told apart.
    assert head(base, against=moved).double() != pytest.approx(expected, rel=0.05)


def test_stands_beside_the_interference() -> None:
    texts = [
        CalibrationTexts("facts", 1.0, [], [], "", 0, None),  # type: ignore[arg-type]
        CalibrationTexts("french", None, [], [], "", 0, None),  # type: ignore[arg-type]
    ]
    ratios = {name: {"a": torch.tensor(0.3), "b": torch.tensor(0.4)} for name in ("calibration", "facts", "french")}
    found = summarise(ratios, texts, {"calibration": 0.25, "facts": 0.25, "french": 1.5})
    assert found["divergence"] == 0.25 and found["by_probe"]["french"]["divergence"] == 1.5
    tables = "\n".join(interference_tables(found))
    assert (
        "| calibration mixture | 0.4 | 0.354 | 0.35 | 0.25 |" in tables
        and "| french | 0.4 | 0.354 | 0.35 | 1.5 |" in tables
    )
    # An older run's figures have none.
    older = summarise(ratios, texts)
    assert "| french | 0.4 | 0.354 | 0.35 | – |" in "\n".join(interference_tables(older))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energies_leave_padding_out_and_lose_no_digits(dtype: torch.dtype) -> None:
    """Σ‖v‖² against float64 over the same values: float32 sums of 4,096 squares are within 1e-6."""
    values = torch.randn(3, 5, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    values[~mask] = torch.nan
    rows, columns = mask.nonzero(as_tuple=True)
    wanted = float(values[mask].double().square().sum())
    assert float(energy_of(values, (rows, columns))) == pytest.approx(wanted, rel=1e-6)
    whole = values[:1]
    assert float(energy_of(whole, None)) == pytest.approx(float(whole.double().square().sum()), rel=1e-6)
    assert energy_of(whole, None).dtype == torch.float64
