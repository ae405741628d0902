"""Toy models from configs, PEFT adapters on them with updates of any kind, and what PEFT itself makes of them."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers.world import HIDDEN, VOCABULARY, make_base, write_rows
from nslora_dist.export import Factors
from nslora_dist.merge_recipe import MergeRecipe

AUTO = {
    "llama": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
}
REGEX = {
    "llama": r".*layers\.[0-9]+\.(self_attn\.(q|v)_proj|mlp\.down_proj)",
    "bert": r".*layer\.[0-9]+\.(attention\.self\.(query|value)|output\.dense)",
    "vit": r".*layers\.[0-9]+\.(attention\.(q|v)_proj|mlp\.fc2)",
}
LISTED = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bert": ["query", "value", *(f"bert.encoder.layer.{n}.output.dense" for n in range(4))],
    "vit": ["q_proj", "v_proj", "fc2"],
}
FIRST = {
    "llama": "model.layers.0.self_attn.q_proj",
    "bert": "bert.encoder.layer.0.attention.self.query",
    "vit": "vit.layers.0.attention.q_proj",
}


def make_model(folder: Path, family: str, **changes: Any) -> Path:
    """A random base of four blocks."""
    if family == "llama":
        return make_base(folder, num_hidden_layers=4, **changes)
    torch.manual_seed(0)
    shared = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "num_labels": 3,
    }
    if family == "bert":
        config: Any = transformers.BertConfig(vocab_size=VOCABULARY, **shared)
        model: Any = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.ViTConfig(image_size=16, patch_size=8, **shared)
        model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer" in name and parameter.ndim == 2:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def load(base: Path, family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return getattr(transformers, AUTO[family]).from_pretrained(base, dtype=dtype).eval()


def make_adapter(folder: Path, base: Path, family: str, *, seed: int, like: Path | None = None, **config: Any) -> Path:
    """A PEFT adapter whose A and B are random; A leans on a few directions of its own, as a trained one does.

    Args:
        like: an adapter whose A's are taken over.
    """
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": LISTED[family]} | config
    if family == "llama":
        settings.setdefault("task_type", "CAUSAL_LM")
    model = get_peft_model(load(base, family), LoraConfig(**settings))
    shared = None if like is None else PeftModel.from_pretrained(load(base, family), str(like))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in lora_modules(model).items():
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            a.copy_(torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5)
            b.copy_(torch.randn(b.shape, generator=generator) * 0.05)
            if shared is not None:
                a.copy_(lora_modules(shared)[name].lora_A["default"].weight)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return folder


def lora_modules(model: nn.Module) -> dict[str, Any]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}


def peft_updates(folder: Path, base: Path, family: str) -> dict[str, Tensor]:
    """Module → ΔW in float64, as PEFT computes it."""
    model = PeftModel.from_pretrained(load(base, family), str(folder))
    return {n: m.get_delta_weight("default").detach().double() for n, m in lora_modules(model).items()}


def total(updates: list[dict[str, Tensor]], coefficients: list[float]) -> dict[str, Tensor]:
    """Σ λ ΔW, module by module."""
    found: dict[str, Tensor] = {}
    for coefficient, update in zip(coefficients, updates, strict=True):
        for name, value in update.items():
            found[name] = found.get(name, torch.zeros_like(value)) + coefficient * value
    return found


def with_updates(base: Path, family: str, updates: dict[str, Tensor]) -> PreTrainedModel:
    """The base with dense updates added."""
    model = load(base, family)
    with torch.no_grad():
        for name, update in updates.items():
            model.get_submodule(name).weight += update.float()
    return model


def arguments(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    if family == "vit":
        return {"pixel_values": torch.randn(5, 3, 16, 16, generator=generator)}
    ids = torch.randint(4, VOCABULARY - 1, (5, 9), generator=generator)
    mask = torch.ones_like(ids)
    if family == "bert":
        mask[0, 6:] = 0
        mask[3, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: nn.Module, family: str) -> Tensor:
    return model(**arguments(family)).logits


def write_inputs(folder: Path, family: str) -> dict[str, dict[str, Any]]:
    """Inputs of the adapters ``a`` and ``b``: text for the LLaMA, ready tensors otherwise."""
    made = {}
    for number, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(number)
        if family == "llama":
            rows = []
            for _ in range(7):
                length = int(torch.randint(4, 12, (1,), generator=generator))
                words = torch.randint(0, 60, (length,), generator=generator).tolist()
                rows.append({"text": " ".join(f"w{word}" for word in words)})
            path = write_rows(folder / f"{name}.jsonl", rows)
            made[name] = {"path": str(path), "samples": 7}
            continue
        path = folder / f"{name}.safetensors"
        if family == "vit":
            tensors = {"pixel_values": torch.randn(7, 3, 16, 16, generator=generator)}
        else:
            mask = torch.ones(7, 9, dtype=torch.int64)
            mask[number, 5:] = 0
            tensors = {"input_ids": torch.randint(4, 60, (7, 9), generator=generator), "attention_mask": mask}
        save_file(tensors, path)
        made[name] = {"path": str(path)}
    return made


def recipe(base: Path | None, adapters: dict[str, Path], target: Path, **changes: Any) -> MergeRecipe:
    tree: dict[str, Any] = {
        "name": "toy",
        "adapters": {name: {"path": str(path)} for name, path in adapters.items()},
        "method": "arithmetic",
        "output_dir": str(target),
    }
    if base is not None:
        tree["base_model"] = {"path": str(base), "dtype": "float32"} | changes.pop("base_model", {})
    if "coefficients" in changes:
        for name, value in changes.pop("coefficients").items():
            tree["adapters"][name]["coefficient"] = value
    return MergeRecipe.model_validate(tree | changes)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def dense(pair: Factors) -> Tensor:
    return pair.lora_b.double() @ pair.lora_a.double()
