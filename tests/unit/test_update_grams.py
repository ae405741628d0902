"""C = A G Aᵀ of a task's own activations, collected from adapted linears at work."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nslora_dist.adapter import AdaptedLinear
from nslora_dist.batches import IGNORED, Batch
from nslora_dist.errors import UserError
from nslora_dist.frozen import FrozenLinear
from nslora_dist.update_grams import UPDATE_GRAMS_FILE, collect_update_grams, read_update_grams, write_update_grams

CPU = torch.device("cpu")
WIDTH, RANK, VOCABULARY = 12, 3, 20


class Two(nn.Module):
    """An embedding and two adapted linears, the second reading what the first one's adapter changed."""

    def __init__(self, *, residual: bool = False, freeze_a: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        for name in ("first", "second"):
            base = FrozenLinear(nn.Linear(WIDTH, WIDTH), quantized=False, dtype=torch.float32)
            base.fill((torch.randn(WIDTH, WIDTH),), torch.randn(WIDTH))
            module = AdaptedLinear(
                base,
                name=f"layers.{name}",
                in_features=WIDTH,
                out_features=WIDTH,
                rank=RANK,
                scale=2.0,
                freeze_a=freeze_a,
                residual=residual,
                dtype=torch.float32,
            )
            module.fill(torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK) if residual else None, device=CPU)
            with torch.no_grad():  # as after training
                module.lora_B.copy_(torch.randn(WIDTH, RANK))
                if not freeze_a:
                    module.lora_A.add_(torch.randn(RANK, WIDTH))
            setattr(self, name, module)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.embed(ids))))


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for rows, length in ((2, 5), (3, 4)):
        ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 3:] = 0
        made.append(Batch(ids, mask, None, torch.full_like(ids, IGNORED)))
    filler = torch.zeros(1, 2, dtype=torch.int64)
    positions = [None, torch.arange(2)[None]]  # an idle rank's: of padded rows, and of packed ones
    return [*made, *(Batch(filler, None, p, torch.full_like(filler, IGNORED), unmasked_padding=2) for p in positions)]


@pytest.mark.parametrize(("residual", "freeze_a"), [(False, True), (True, False), (True, True)])
def test_sums_over_real_tokens_with_the_adapter_active(residual: bool, freeze_a: bool) -> None:
    model = Two(residual=residual, freeze_a=freeze_a)
    found = collect_update_grams(model, batches(), lambda batch: model(batch.input_ids), device=CPU)
    inputs: dict[str, list[Tensor]] = {"layers.first": [], "layers.second": []}
    for batch in batches()[:2]:
        x = model.embed(batch.input_ids)
        real = batch.attention_mask == 1
        inputs["layers.first"].append(x[real])
        inputs["layers.second"].append(torch.tanh(model.first(x))[real])
    for name, module in (("layers.first", model.first), ("layers.second", model.second)):
        x = torch.cat(inputs[name]).double()
        a = module.lora_A
        if residual:  # the exported adapter is [A; A₀]
            a = torch.cat([a, a if freeze_a else module.start_A])
        z = x @ a.double().T
        torch.testing.assert_close(found[name], z.T @ z, rtol=1e-5, atol=1e-5)
        assert found[name].shape[0] == (2 * RANK if residual else RANK)
    assert not model.first._forward_pre_hooks


def test_a_module_that_never_ran_has_a_zero_gram() -> None:
    model = Two()
    found = collect_update_grams(model, batches(), lambda batch: model.first(model.embed(batch.input_ids)), device=CPU)
    assert found.keys() == {"layers.first", "layers.second"} and not found["layers.second"].any()


def test_on_disk(tmp_path: Path) -> None:
    assert read_update_grams(tmp_path) is None
    gram = torch.eye(3, dtype=torch.float64) / 3
    write_update_grams(tmp_path, {"layers.first": gram})
    found = read_update_grams(tmp_path)
    assert found is not None and torch.equal(found["layers.first"], gram.float())
    with pytest.raises(UserError, match=r"layers\.first: its update Gram is not finite"):
        write_update_grams(tmp_path, {"layers.first": gram * torch.nan})
    save_file({"layers.first": torch.ones(2, 3)}, tmp_path / UPDATE_GRAMS_FILE)
    with pytest.raises(UserError, match=r"layers\.first \(2, 3\) is no finite, r x r matrix|no finite r x r"):
        read_update_grams(tmp_path)
    (tmp_path / UPDATE_GRAMS_FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="no whole safetensors file"):
        read_update_grams(tmp_path)
