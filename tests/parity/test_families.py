"""Every family at toy size: groups by observation, streamed calibration, training, export, Hugging Face's function."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.grams import whole_model_grams
from helpers.stages import started
from helpers.world import FAMILIES, make_base, make_recipe, make_texts
from nslora_dist.base_config import load_config
from nslora_dist.base_model import build_empty
from nslora_dist.batches import Batch
from nslora_dist.calibration_data import text_batches
from nslora_dist.input_groups import input_groups

LOGITS = 2e-5
"""float32 logits of magnitude 1 after two blocks: sums of 64 to 128 products in another order, and another attention
kernel, differ by some ten units in the last place."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_texts(tmp_path_factory.mktemp("texts"))


def some_ids() -> Tensor:
    return torch.randint(3, 60, (3, 14), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, texts: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    recipe = make_recipe(texts, base, tmp_path / "run", train={"max_steps": 2})
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    groups = input_groups(build_empty(recipe.base_model, load_config(recipe.base_model)))
    last_parts = [tuple(shape.name.rsplit(".", 1)[1] for shape in group.modules) for group in groups]
    block = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert last_parts == 2 * block

    with started(recipe) as stage:
        # Step 0 is the base's own function: logits, loss and the greedy answers that are read off them.
        ids = some_ids()
        with torch.no_grad():
            expected = plain(ids).logits[:, :-1]
        torch.testing.assert_close(stage.logits(ids), expected, atol=LOGITS, rtol=0)
        batch = stage.data.micro_batches(0, rank=0, world_size=1)[0]
        assert batch.attention_mask is not None, "a padded batch is the harder case"
        with torch.no_grad():
            loss = plain(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
            mine = stage.engine.forward(batch) / batch.supervised_tokens
        torch.testing.assert_close(mine, loss, atol=2e-5, rtol=0)

        # The streamed, padded pass sees what hooks on the plain model see, sequence by sequence.
        calibrated = stage.run.null_space()
        a = stage.run.texts[0]
        batches = text_batches(a.calibration, batch_size=1, rank=0, world_size=1)
        wanted = whole_model_grams(plain, hf_forward(plain), groups, batches)
        for group in groups:
            basis = calibrated.tensors[f"{group.name}.basis"]
            exact, energies = wanted[group.name]
            gram = exact.float()
            found = calibrated.tensors[f"{group.name}.update_gram.a"]
            scale = float(
                torch.linalg.matrix_norm(gram, 2)
            )  # rounding of the Gram sets the floor, not of the small one
            torch.testing.assert_close(found, basis.T @ gram @ basis, atol=2e-6 * scale, rtol=1e-4)
            for module, energy in energies.items():
                reference = calibrated.manifest["modules"][module]["references"]["a"]
                assert reference == pytest.approx(float(energy), rel=1e-5), module

        losses = stage.train().losses
        assert len(losses) == 2 and losses[1] != losses[0]
        after = stage.logits(ids)
        assert (after - expected).abs().max() > 100 * LOGITS, "two steps changed nothing"
        folder = stage.export(tmp_path / "adapter")

    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 14 and all(tensor.numel() for tensor in tensors.values())
    adapted = PeftModel.from_pretrained(plain, folder)
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits[:, :-1], after, atol=LOGITS, rtol=0)


def hf_forward(model: torch.nn.Module):
    def forward(batch: Batch) -> None:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

    return forward


def test_window_and_rope_matter(tmp_path: Path) -> None:
    """The toy windows and rope scaling change what the model computes, or the families above would test nothing."""
    ids = some_ids()
    for family, off in (("mistral_window", {"sliding_window": None}), ("llama31_rope", {"rope_parameters": None})):
        models = []
        for name, changes in (("on", {}), ("off", off)):
            base = make_base(tmp_path / family / name, family, **changes)
            models.append(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
        with torch.no_grad():
            difference = (models[0](ids).logits - models[1](ids).logits).abs().max()
        assert difference > 100 * LOGITS, family
