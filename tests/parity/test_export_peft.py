"""What PEFT makes of an exported adapter on the original base is what the engine computed in training."""

from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers.parity_run import CASES, ENGINES, IDS, Found

Results = dict[str, dict[str, Found]]


def load_base(folder: Path, section: dict[str, Any]) -> torch.nn.Module:
    """The base as a user of the adapter loads it, in the dtype and quantisation of the training."""
    dtype = getattr(torch, section.get("dtype", "float32"))
    if "quantization" not in section:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=nf4, device_map="cpu")
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # Where the processor can, bitsandbytes multiplies in bfloat16 whatever the compute dtype asked for.
            module.support_avx512bf16_for_cpu = False
    return model


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits[:, :-1].float()


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_was_trained(found: Results, world: Path, case: str) -> None:
    """Logits of magnitude 0.6.

    float32 differs by the order of sums alone, residual form by the cancellation in B A - B₀ A₀ besides: 1e-5. In
    bfloat16 PEFT adds the update to an output already rounded, in another order: a few units of 2⁻⁸ a block.
    """
    section = CASES[case].changes["base_model"]
    base = load_base(world / CASES[case].base, section)
    tolerance = 0.03 if section.get("dtype") == "bfloat16" else 1e-5
    plain = logits(base)
    for engine in ENGINES:
        result = found[engine][case]
        torch.testing.assert_close(result.start, plain, atol=tolerance, rtol=0)
        tensors = load_file(result.adapter / "adapter_model.safetensors")
        assert all(t.numel() and t.isfinite().all() for t in tensors.values())
        ranks = [t.shape[0] for key, t in tensors.items() if "lora_A" in key]
        if case.startswith("null_lora"):
            assert ranks == [2 * len(parts["A"]) for _, parts in sorted(result.factors.items())]
        else:
            assert ranks == 14 * [16 if CASES[case].changes["adapter"].get("form") == "residual" else 8]
        model = peft.PeftModel.from_pretrained(base, result.adapter)
        adapted = logits(model)
        torch.testing.assert_close(adapted, result.logits, atol=tolerance, rtol=0)
        moved = (adapted - plain).norm()
        assert (adapted - result.logits).norm() < 0.2 * moved, f"{engine}: the update is lost in the tolerance"
        base = model.unload()


@pytest.mark.parametrize("case", CASES)
def test_engines_export_the_same(found: Results, case: str) -> None:
    """The same keys, shapes and dtypes from every engine; frozen A to the bit."""
    files = {e: load_file(found[e][case].adapter / "adapter_model.safetensors") for e in ENGINES}
    for engine in ("zero3", "fsdp2"):
        assert files[engine].keys() == files["single"].keys()
        for key, tensor in files[engine].items():
            reference = files["single"][key]
            assert tensor.shape == reference.shape and tensor.dtype == reference.dtype
            if "lora_A" in key and "v1" not in case and "method" not in CASES[case].changes["adapter"]:
                assert torch.equal(tensor, reference), f"{engine} {key}"


@pytest.mark.parametrize("case", [case for case in CASES if "method" not in CASES[case].changes["adapter"]])
def test_engines_leave_the_same_update_grams(found: Results, case: str) -> None:
    """Of the exported A's rows, so of rank 2r in residual form; the rows of a step are the same however many ranks."""
    files = {e: load_file(found[e][case].adapter / "update_grams.safetensors") for e in ENGINES}
    factors = load_file(found["single"][case].adapter / "adapter_model.safetensors")
    ranks = {
        key[len("base_model.model.") : -len(".lora_A.weight")]: len(a) for key, a in factors.items() if "_A" in key
    }
    # bfloat16 activations differ by rounding between ranks' batches, and B by a few steps of it.
    tolerance = 0.05 if CASES[case].changes["base_model"].get("dtype") == "bfloat16" else 1e-3
    for engine in ENGINES:
        assert {name: len(gram) for name, gram in files[engine].items()} == ranks
        for name, gram in files[engine].items():
            reference = files["single"][name]
            assert torch.linalg.matrix_norm(gram - reference) <= tolerance * torch.linalg.matrix_norm(reference), name
