"""The exported folder is an ordinary LoRA: PEFT, without this project, computes W + scale · B A from it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nslora_dist import export
from nslora_dist.errors import UserError
from nslora_dist.export import Factors, read_adapter, residual_factors, write_adapter

TARGETS = ["q_proj", "v_proj", "down_proj"]
LOGIT_ATOL = (
    1e-5  # float32; the logits are of the order of 1, and W x + B(A x) is summed in another order than (W + BA) x
)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


def targets(model: LlamaForCausalLM) -> Iterator[tuple[str, torch.nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS:
            yield name, module


def random_factors(ranks: Mapping[str, int] | int = 4, *, dtype: torch.dtype = torch.float32) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, linear in targets(tiny_llama()):
        rank = ranks if isinstance(ranks, int) else ranks.get(name, 4)
        a = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
        b = torch.randn(linear.out_features, rank, generator=generator) / rank**0.5
        made[name] = Factors(a.to(dtype), b.to(dtype))
    return made


def write(folder: Path, factors: Mapping[str, Factors], **changes: object) -> None:
    options: dict = {"scale": 1.0, "base_model": "org/base", "revision": None, "target_modules": TARGETS, "card": {}}
    write_adapter(folder, factors, **options | changes)


def logits_by_peft(folder: Path) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(tiny_llama(), str(folder))(torch.arange(24).reshape(2, 12)).logits


def logits_dense(updates: Mapping[str, Tensor]) -> Tensor:
    model = tiny_llama()
    with torch.no_grad():
        for name, linear in targets(model):
            linear.weight += updates[name]
        return model(torch.arange(24).reshape(2, 12)).logits


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_computes_the_dense_update(tmp_path: Path, scale: float, dtype: torch.dtype) -> None:
    factors = random_factors(dtype=dtype)
    write(tmp_path / "adapter", factors, scale=scale)
    want = logits_dense({m: scale * f.lora_b.float() @ f.lora_a.float() for m, f in factors.items()})
    got = logits_by_peft(tmp_path / "adapter")
    torch.testing.assert_close(got, want, atol=LOGIT_ATOL, rtol=0)
    assert (want - logits_dense({m: torch.zeros(()) for m in factors})).abs().max() > 0.05
    stored = load_file(tmp_path / "adapter" / export.WEIGHTS_FILE)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in stored


def test_uneven_ranks_keep_the_scale(tmp_path: Path) -> None:
    ranks = {"model.layers.1.self_attn.q_proj": 2, "model.layers.0.mlp.down_proj": 7}
    factors = random_factors(ranks)
    write(tmp_path / "adapter", factors, scale=0.7)
    want = logits_dense({m: 0.7 * f.lora_b @ f.lora_a for m, f in factors.items()})
    torch.testing.assert_close(logits_by_peft(tmp_path / "adapter"), want, atol=LOGIT_ATOL, rtol=0)
    back, config = read_adapter(tmp_path / "adapter")
    assert config["r"] == 4 and config["rank_pattern"] == ranks
    for module, pair in back.items():
        assert export.module_scale(config, module, pair.rank) == pytest.approx(0.7, rel=1e-15)


def test_residual_factors_are_exact(tmp_path: Path) -> None:
    start, end = random_factors(), random_factors({})
    end = {m: Factors(f.lora_a + 0.1, f.lora_b.flip(0)) for m, f in end.items()}
    doubled = {m: residual_factors(end[m].lora_a, end[m].lora_b, start[m].lora_a, start[m].lora_b) for m in start}
    write(tmp_path / "adapter", doubled, scale=2.0)
    assert read_adapter(tmp_path / "adapter")[1]["lora_alpha"] == 16  # scale x 2r
    want = logits_dense({m: 2.0 * (end[m].lora_b @ end[m].lora_a - start[m].lora_b @ start[m].lora_a) for m in start})
    torch.testing.assert_close(logits_by_peft(tmp_path / "adapter"), want, atol=LOGIT_ATOL, rtol=0)
    for pair in start.values():
        untrained = residual_factors(pair.lora_a, pair.lora_b, pair.lora_a, pair.lora_b)
        assert (untrained.lora_b @ untrained.lora_a).abs().max() < 1e-6


def test_residual_factors_keep_the_wider_dtype() -> None:
    a, b = torch.randn(2, 8).bfloat16(), torch.randn(6, 2).bfloat16()
    a0, b0 = torch.randn(2, 8), torch.randn(6, 2)
    pair = residual_factors(a, b, a0, b0)
    assert pair.lora_a.dtype == pair.lora_b.dtype == torch.float32 and pair.rank == 4
    torch.testing.assert_close(pair.lora_b @ pair.lora_a, b.float() @ a.float() - b0 @ a0)


def test_config_says_what_peft_needs(tmp_path: Path) -> None:
    write(tmp_path / "adapter", random_factors(), scale=0.5, revision="abc123")
    config = json.loads((tmp_path / "adapter" / export.CONFIG_FILE).read_text())
    want = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": "org/base",
        "revision": "abc123",
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
    }
    assert {key: config[key] for key in want} == want
    assert sorted(config["target_modules"]) == sorted(TARGETS)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        export.CONFIG_FILE,
        export.WEIGHTS_FILE,
    ]


def test_read_gives_back_what_was_written(tmp_path: Path) -> None:
    factors = random_factors(dtype=torch.bfloat16)
    write(tmp_path / "adapter", factors)
    back, _ = read_adapter(tmp_path / "adapter")
    assert back.keys() == factors.keys()
    for module, pair in factors.items():
        assert torch.equal(back[module].lora_a, pair.lora_a) and torch.equal(back[module].lora_b, pair.lora_b)


@pytest.mark.parametrize(
    ("pair", "error", "message"),
    [
        (Factors(torch.ones(4, 32), torch.empty(0)), ValueError, "lora_B is empty"),
        (Factors(torch.ones(4), torch.ones(32, 4)), ValueError, "lora_A has shape"),
        (Factors(torch.empty(0, 32), torch.ones(32, 0)), ValueError, "lora_A is empty"),
        (Factors(torch.ones(4, 32), torch.ones(32, 3)), ValueError, r"lora_A \(4, 32\) and lora_B \(32, 3\) differ"),
        (Factors(torch.ones(4, 32), torch.full((32, 4), float("nan"))), UserError, "lora_B has values"),
        (Factors(torch.full((4, 32), float("inf")), torch.ones(32, 4)), UserError, "lora_A has values"),
    ],
)
def test_bad_factors_name_the_module_and_write_nothing(
    tmp_path: Path, pair: Factors, error: type[Exception], message: str
) -> None:
    write(tmp_path / "adapter", random_factors())
    before = (tmp_path / "adapter" / export.WEIGHTS_FILE).read_bytes()
    bad = random_factors() | {"model.layers.1.self_attn.v_proj": pair}
    with pytest.raises(error, match=rf"model\.layers\.1\.self_attn\.v_proj: {message}"):
        write(tmp_path / "adapter", bad)
    assert (tmp_path / "adapter" / export.WEIGHTS_FILE).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_factors_and_targets_have_to_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="down_proj: none of target_modules"):
        write(tmp_path / "adapter", random_factors(), target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="'k_proj' has no factors"):
        write(tmp_path / "adapter", random_factors(), target_modules=[*TARGETS, "k_proj"])
    with pytest.raises(TypeError, match="give a list"):
        write(tmp_path / "adapter", random_factors(), target_modules="q_proj")
    with pytest.raises(UserError, match="no module was adapted"):
        write(tmp_path / "adapter", {})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"base_model.model.lm_head.weight": torch.ones(2)}, "no LoRA factor"),
        (lambda t: dict(list(t.items())[:1]), "has only lora_A"),
        (lambda t: {key: value[:0] for key, value in t.items()}, "is empty"),
        (lambda t: {}, "holds no factors"),
    ],
)
def test_reading_a_foreign_or_damaged_adapter(tmp_path: Path, change, message: str) -> None:
    folder = tmp_path / "adapter"
    write(folder, random_factors())
    save_file(change(load_file(folder / export.WEIGHTS_FILE)), folder / export.WEIGHTS_FILE)
    with pytest.raises(UserError, match=message):
        read_adapter(folder)
    (folder / export.CONFIG_FILE).write_text('{"peft_type": "IA3"}')
    with pytest.raises(UserError, match="not LORA"):
        read_adapter(folder)
    with pytest.raises(UserError, match="cannot be read"):
        read_adapter(tmp_path / "absent")


def test_targets_where_some_modules_have_no_factors() -> None:
    """Whole kinds keep their short name, the others of a kind are named in full, and PEFT's own check agrees."""
    modules = [f"model.layers.{block}.self_attn.{kind}_proj" for block in (0, 1) for kind in ("q", "o", "k")]
    left_out = [modules[1], modules[2], modules[5]]
    kept = [module for module in modules if module not in left_out]
    targets = export.fitting_targets(["q_proj", "k_proj", "o_proj"], kept, left_out)
    assert targets == ["q_proj", modules[4]]
    assert export.fitting_targets(["q_proj", "k_proj"], modules, []) == ["q_proj", "k_proj"]
    pair = Factors(torch.ones(2, 3), torch.ones(3, 2))
    export._check_targets(dict.fromkeys(kept, pair), targets)
    with pytest.raises(ValueError, match="'k_proj' has no factors"):
        export._check_targets(dict.fromkeys(kept, pair), ["q_proj", "o_proj", "k_proj"])


def test_scale_of_foreign_configs() -> None:
    config = {"lora_alpha": 16, "use_rslora": True, "alpha_pattern": {"q_proj": 8}}
    assert export.module_scale(config, "model.layers.0.self_attn.q_proj", 4) == 4.0
    assert export.module_scale(config, "model.layers.0.self_attn.k_proj", 4) == 8.0
    assert export.module_scale({"lora_alpha": 16, "alpha_pattern": None}, "x", 8) == 2.0


def test_model_card(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    card = {
        "name": "tiny_math",
        "method": "lora_null",
        "form": "delta",
        "a_init": "projected",
        "freeze_a": True,
        "sources": {"facts": {"path": "facts.jsonl", "sequences": 64, "tokens": 4096, "weight": 1.0}},
        "probes": {"news": {"path": "news.jsonl", "tokens": 2048}},
        "leak": {"calibration": 1.2e-4, "heldout": 2.4e-4, "random": 0.0625},
        "interference": {
            "max": 0.0812,
            "rms": 0.05,
            "mean": 0.04,
            "budget": {"limit": 0.08, "over": "module", "final": 0.07999999},
            "by_source": {"facts": {"max": 0.07, "rms": 0.04, "mean": 0.03}},
            "by_probe": {"news": {"max": 0.21, "rms": 0.12, "mean": 0.11}},
        },
        "evaluation": {
            "null_space": {"adaptation": 0.998, "retention": 0.991, "retention_by": {"facts": 0.99}},
            "base": {"adaptation": 0.0, "retention": 1.0, "retention_by": {"facts": 1.0, "sum|max": None}},
        },
        "versions": {"torch": "2.13.0"},
    }
    write(tmp_path / "adapter", random_factors(), card=card, revision="abc123")
    text = (tmp_path / "adapter" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.base_model) == ("peft", "org/base") and "null-space" in data.tags
    for line in (
        "# tiny_math",
        "- A frozen: yes",
        "- rank: 4",
        '("org/base", revision="abc123", dtype="auto")',
        "| facts | source | facts.jsonl | 64 | 4096 | 1.0 |",
        "| news | probe | news.jsonl | – | 2048 | – |",
        "| held-out texts | 0.00024 |",
        "a budget of 0.08 for every module, on the calibration mixture; at the end the largest module's is 0.08 ",
        "| calibration mixture | 0.0812 | 0.05 | 0.04 |",
        "| news | 0.21 | 0.12 | 0.11 |",
        r"|  | task accuracy | knowledge retention | facts | sum\|max |",
        "| null-space adapter | 99.8% | 99.1% | 99.0% | – |",
        "- torch 2.13.0",
    ):
        assert line in text
    assert text.index("| base |") < text.index("| null-space adapter |")


def test_card_of_null_lora(tmp_path: Path) -> None:
    def entry(rank: int, right: int, left: int) -> dict[str, Any]:
        return {"rank": rank, "right": {"kept": right}, "left": {"kept": left}}

    modules = {"model.layers.0.q_proj": entry(8, 16, 12), "model.layers.1.q_proj": entry(4, 5, 9)}
    modules["model.layers.0.up_proj"] = entry(0, 0, 16)
    facts = {"threshold": 0.1, "dim": 16, "left_out": ["model.layers.0.up_proj"], "modules": modules}
    write(tmp_path / "adapter", random_factors(), card={"method": "null_lora", "weight_null_space": facts})
    text = (tmp_path / "adapter" / "README.md").read_text()
    for line in (
        "2512.15233",
        "singular values up to 0.1 of its largest, no more than 16 a side.",
        "| q_proj | 2 | 5 to 16 | 9 to 12 | 4 to 8 |",
        "| up_proj | 1 | 0 | 16 | 0 |",
        "Left out, for want of a null space: model.layers.0.up_proj.",
    ):
        assert line in text
    assert "- form" not in text and "null-lora" in text


def test_a_sparse_card_has_no_empty_sections_and_no_local_base_for_the_hub(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "adapter", random_factors({"model.layers.0.mlp.down_proj": 2}), base_model=str(tmp_path / "base"))
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "base_model:" not in text and f"`{tmp_path / 'base'}`" in text
    assert "- rank: 2 to 4" in text and "None" not in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Loading", "## Versions"]
