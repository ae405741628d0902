"""A toy world on disk: bases of several families, a word-level tokenizer, texts and tasks, and recipes over them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from nslora_dist.recipe import Recipe

WORDS = 61
VOCABULARY = 67  # odd, so that no number of ranks shards the embedding evenly
HIDDEN, INTERMEDIATE = 64, 128

SMALL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_no_gqa": ("Llama", {"num_key_value_heads": 4}),
    "llama31_rope": ("Llama", {"rope_parameters": LLAMA31_ROPE}),
    "mistral_window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen25_tied_window": (
        "Qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {}),
}


def make_base(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A random base of the family with its tokenizer; biases and norms are random, so that none can be forgotten."""
    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SMALL | settings | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.3)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            elif "layers" in key:
                parameter.mul_(4.0)  # at the default 0.02 a toy block hardly changes its input
    model.save_pretrained(folder)
    (qwen_tokenizer() if name.startswith("Qwen") else tokenizer()).save_pretrained(folder)
    return folder


def qwen_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word is a letter and digits: transformers gives a Qwen base Qwen's own rules, whatever the folder says."""
    known = ["<s>", "</s>", "<pad>", "<unk>", *"0123456789w", "Ġ", "Ġw"]
    return transformers.Qwen2Tokenizer(
        vocab={token: id_ for id_, token in enumerate(known)},
        merges=[("Ġ", "w")],
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word, ``<s>`` in front."""
    words = ["<s>", "</s>", "<pad>", "<unk>", *(f"w{number}" for number in range(WORDS))]
    made = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def change_weights(folder: Path, target: Path, change: Any) -> Path:
    """A copy of a base with ``change(tensors)`` applied to its weights in place."""
    target.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def words(dice: random.Random, low: int, high: int, *, of: int = WORDS - 1) -> str:
    """Random words; the vocabulary's last one never comes up by chance."""
    return " ".join(f"w{dice.randrange(of)}" for _ in range(dice.randint(low, high)))


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_texts(folder: Path) -> Path:
    """Sources ``a`` (short rows, half the vocabulary) and ``b`` (long rows), probe ``p``, and a task."""
    dice = random.Random(0)
    write_rows(folder / "a.jsonl", [{"text": words(dice, 3, 7, of=30)} for _ in range(20)])
    write_rows(folder / "b.jsonl", [{"text": words(dice, 9, 14)} for _ in range(20)])
    write_rows(folder / "p.jsonl", [{"text": words(dice, 5, 14)} for _ in range(13)])
    task = [{"prompt": words(dice, 3, 8), "response": words(dice, 1, 4, of=6)} for _ in range(70)]
    write_rows(folder / "task.jsonl", task)
    return folder


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``tree`` with ``changes`` laid over it, section by section."""
    merged = dict(tree)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key not in ("sources", "probes")
        merged[key] = merge(merged[key], value) if both else value
    return merged


def make_recipe(texts: Path, base: Path, output: Path, **changes: Any) -> Recipe:
    """A recipe over the toy world; ``changes`` are laid over its sections."""
    tree: dict[str, Any] = {
        "name": "toy",
        "base_model": {"path": str(base), "dtype": "float32"},
        "calibration": {
            "sources": {"a": {"path": str(texts / "a.jsonl")}, "b": {"path": str(texts / "b.jsonl"), "weight": 2.0}},
            "probes": {"p": {"path": str(texts / "p.jsonl")}},
            "samples": 20,
            "sequence_length": 15,
            "batch_size": 3,
            "heldout_fraction": 0.15,
            "solver": {"method": "eigh"},
        },
        "adapter": {"rank": 8},
        "data": {"path": str(texts / "task.jsonl"), "max_length": 32},
        "train": {
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "max_steps": 20,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "warmup_ratio": 0.15,
            "max_grad_norm": 0.06,
            "log_every": 5,
        },
        "engine": {"name": "single"},
        "output_dir": str(output),
    }
    return Recipe.model_validate(merge(tree, changes))


def zero_config(folder: Path, **knobs: Any) -> Path:
    """A DeepSpeed file that partitions every parameter and frees it after use; by default toy ones would stay whole."""
    path = folder / "zero.json"
    strict = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
    path.write_text(json.dumps({"zero_optimization": strict | knobs}))
    return path
