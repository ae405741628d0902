"""``calibrate`` and ``init_peft`` on models that other people built, in one process."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    XLNetConfig,
    XLNetLMHeadModel,
)

import nslora_dist
from nslora_dist.calibration import store
from nslora_dist.errors import UserError

DOCS = Path(__file__).resolve().parents[2] / "docs"
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def bert() -> tuple[nn.Module, list[dict[str, Tensor]], list[str]]:
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **SMALL))
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[1, 12:] = 0
    return (
        model,
        [{"input_ids": torch.randint(0, 50, (3, 20)), "attention_mask": mask} for _ in range(8)],
        ["query", "key", "value"],
    )


def vit() -> tuple[nn.Module, list[dict[str, Tensor]], list[str]]:
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=3, **SMALL))
    groups = [n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".0." in n]
    return model, [{"pixel_values": torch.randn(3, 3, 32, 32)} for _ in range(8)], groups[:3]


def llama() -> tuple[nn.Module, list[dict[str, Tensor]], list[str]]:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=99, **SMALL))
    return model, [{"input_ids": torch.randint(0, 99, (2, 40))} for _ in range(4)], ["q_proj", "k_proj", "v_proj"]


class Wrapper(nn.Module):
    """Keeps a model as DistributedDataParallel and DeepSpeed's engine do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **batch: Tensor) -> Any:
        return self.module(**batch)


MODELS = {"bert": bert, "vit": vit, "llama": llama}


def inputs(model: nn.Module, name: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """(d_in, N) float64: what a module reads at real tokens."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    model.eval()
    found = []
    for batch in batches:
        seen.clear()
        with torch.no_grad():
            model(**batch)
        mask = batch.get("attention_mask")
        x = seen[0]
        found.append(x[mask.bool()] if mask is not None and x.shape[:2] == mask.shape else x.reshape(-1, x.shape[-1]))
    handle.remove()
    return torch.cat(found).double().T


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("a_init", ["orthonormal", "projected"])
def test_bases_are_the_null_spaces_of_what_modules_read(kind: str, a_init: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches, together = MODELS[kind]()
    model.train()
    folder = tmp_path / "null_space"
    # Room for two or three Grams, so that it takes several passes.
    nslora_dist.calibrate(model, batches, rank=6, folder=folder, a_init=a_init, gram_bytes=1e5)
    assert model.training
    space = store.load(folder)
    sharing = [group for group in space.manifest["groups"].values() if len(group["modules"]) == 3]
    assert [[m.rsplit(".", 1)[-1] for m in group["modules"]] for group in sharing] == [together] * 2
    starts = dict(space.starts(space.manifest["modules"], device=torch.device("cpu")))
    assert len(starts) == sum(isinstance(m, nn.Linear) for m in model.modules()) - (kind == "llama")
    for name, entry in space.manifest["modules"].items():
        x = inputs(model, name, batches)
        gram = x @ x.T
        basis = space.tensors[f"{entry['group']}.basis"].double()
        least = torch.linalg.eigvalsh(gram)[:6].sum()
        # float32 sums of a few hundred tokens leave about 1e-7 of the largest eigenvalue uncertain.
        floor = 1e-6 * torch.linalg.matrix_norm(gram, 2)
        assert torch.trace(basis.T @ gram @ basis) <= 1.01 * least + floor
        weight = model.get_submodule(name).weight.detach().double()
        reference = (weight @ x).square().sum()
        assert entry["references"]["calibration"] == pytest.approx(float(reference), rel=1e-4)
        if a_init == "projected":
            rows = starts[name].a.double()
            product = weight @ basis @ basis.T
            assert torch.linalg.matrix_norm(product - product @ torch.linalg.pinv(rows) @ rows) < 1e-4
        else:
            assert torch.equal(starts[name].a, space.tensors[f"{entry['group']}.basis"].T)


def test_peft_model_starts_there_and_tells_what_it_disturbs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches, targets = llama()
    before = model(**batches[0]).logits
    folder = tmp_path / "null_space"
    space = nslora_dist.calibrate(model, batches, rank=6, folder=folder, target_modules=targets)
    peft = get_peft_model(model, LoraConfig(r=6, lora_alpha=12, target_modules=targets))
    layers = nslora_dist.init_peft(peft, folder)
    assert layers.keys() == space.manifest["modules"].keys() and len(layers) == 6
    assert torch.equal(peft(**batches[0]).logits, before)
    trained = {name for name, p in peft.named_parameters() if p.requires_grad}
    assert len(trained) == 6 and all("lora_B" in name for name in trained)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["default"].weight.normal_()
    found = nslora_dist.peft_interference(peft, folder)["calibration"]
    assert nslora_dist.peft_interference(Wrapper(peft), folder)["calibration"] == found
    for name, layer in layers.items():
        a, b = (side["default"].weight.detach().double() for side in (layer.lora_A, layer.lora_B))
        if ".layers.0." in name:  # later ones read what the adapter has changed
            x = inputs(model, f"{name}.base_layer", batches)
            direct = torch.linalg.matrix_norm(2 * b @ a @ x) / torch.linalg.matrix_norm(
                layer.base_layer.weight.detach().double() @ x
            )
            assert found[name] == pytest.approx(float(direct), rel=1e-3)


def test_a_start_that_leaves_the_base_alone_is_replaced(tmp_path: Path) -> None:
    model, batches, targets = llama()
    before = model(**batches[0]).logits
    space = nslora_dist.calibrate(model, batches, rank=6, folder=tmp_path / "n", target_modules=targets)
    peft = get_peft_model(model, LoraConfig(r=6, target_modules=targets, init_lora_weights="orthogonal"))
    layers = nslora_dist.init_peft(peft, tmp_path / "n")
    for name, start in space.starts(layers, device=torch.device("cpu")):
        assert torch.equal(layers[name].lora_A["default"].weight, start.a)
    assert torch.equal(peft(**batches[0]).logits, before)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 4}, "has rank 4, the null space .* has 6; give both the same"),
        ({"r": 6, "target_modules": ["o_proj"]}, "o_proj has an adapter and was not calibrated"),
        ({"r": 6, "use_dora": True}, "is DoRA"),
        ({"r": 6, "init_lora_weights": "pissa"}, "has rewritten the base's weights"),
        ({"r": 6, "init_lora_weights": "mica"}, "freezes B"),
        ({"r": 6, "lora_bias": True}, "trains biases, which no null space holds back"),
        ({"r": 6, "bias": "all"}, "trains biases"),
        ({"r": 6, "target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens is an embedding with an adapter"),
        ({"r": 6, "modules_to_save": ["embed_tokens"]}, "embed_tokens would be trained whole"),
        ({"r": 6, "target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}, "mlp.down_proj would be trained"),
        ({"r": 6, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "norm would be trained whole"),
        ({"r": 6, "modules_to_save": ["lm_head"]}, "lm_head would be trained whole"),
        ({"r": 6, "trainable_token_indices": [1, 2]}, "embed_tokens would be trained whole"),
        ({"r": 6, "kasa_config": KasaConfig()}, "q_proj has PEFT's KasaLinearVariant"),
    ],
)
def test_what_does_not_fit_is_said(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    model, batches, targets = llama()
    nslora_dist.calibrate(model, batches, rank=6, folder=tmp_path / "n", target_modules=targets)
    peft = get_peft_model(model, LoraConfig(**{"target_modules": targets} | config))
    before = {name: p.clone() for name, p in peft.named_parameters()}
    with pytest.raises(UserError, match=said):
        nslora_dist.init_peft(peft, tmp_path / "n")
    assert all(torch.equal(p, before[name]) for name, p in peft.named_parameters())


def test_a_null_space_of_other_layers_is_named(tmp_path: Path) -> None:
    model, batches, targets = llama()
    nslora_dist.calibrate(model, batches, rank=6, folder=tmp_path / "mine", target_modules=targets)
    nslora_dist.calibrate(model, batches, rank=6, folder=tmp_path / "other", target_modules=["up_proj"])
    peft = Wrapper(get_peft_model(model, LoraConfig(r=6, target_modules=targets)))
    nslora_dist.init_peft(peft, tmp_path / "mine")
    with pytest.raises(UserError, match="^peft_interference: .*q_proj has an adapter and was not calibrated .*other"):
        nslora_dist.peft_interference(peft, tmp_path / "other")


def test_padding_is_not_counted_where_the_model_flattens_its_tokens() -> None:
    """OPT gives its MLP (batch · sequence, d)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": 1}
    model = OPTForCausalLM(OPTConfig(vocab_size=50, num_attention_heads=2, max_position_embeddings=64, **sizes))
    ids = torch.randint(4, 50, (6, 20))

    def padded(pad: int, more: int) -> Any:
        batches = []
        for row, length in zip(ids, (20, 9, 14, 20, 5, 17), strict=True):
            width = 20 + more
            kept = torch.arange(width) < length
            text = torch.where(kept, torch.nn.functional.pad(row, (0, more)), pad)
            batches.append({"input_ids": text[None], "attention_mask": kept.long()[None]})
        return nslora_dist.calibrate(model, batches, rank=4, target_modules=["q_proj", "fc1", "fc2"])

    one, other = padded(1, 0), padded(3, 7)
    for name, group in one.manifest["groups"].items():
        eigenvalues = one.tensors[f"{name}.eigenvalues"]
        assert torch.allclose(eigenvalues, other.tensors[f"{name}.eigenvalues"], rtol=1e-3, atol=1e-5)
        for module in group["modules"]:
            energy = one.manifest["modules"][module]["references"]
            assert energy == pytest.approx(other.manifest["modules"][module]["references"], rel=1e-5)


def test_padding_of_a_model_that_turns_its_tokens_or_hides_them() -> None:
    """XLNet runs (sequence, batch, d); a model that prepends tokens of its own has no mask for its rows."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=50, **sizes))
    ids, lengths = torch.randint(10, 50, (3, 12)), torch.tensor([12, 5, 8])
    real = torch.arange(12) < lengths[:, None]

    def energy(pad: int) -> list[float]:
        batches = [{"input_ids": torch.where(real, ids, pad), "attention_mask": real.long()}]
        found = nslora_dist.calibrate(model, batches, rank=4, target_modules=["layer_1", "layer_2"])
        return [value for module in found.manifest["modules"].values() for value in module["references"].values()]

    assert energy(1) == pytest.approx(energy(7), rel=1e-5)

    class Prepending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            x = torch.nn.functional.one_hot(input_ids % 32, 32).float()
            return self.inner(torch.cat([torch.ones(len(x), 2, 32), x], 1))

    batches = [{"input_ids": ids, "attention_mask": real.long()}]
    with pytest.raises(UserError, match=r"inner reads \(3, 14, 32\) where attention_mask is \(3, 12\)"):
        nslora_dist.calibrate(Prepending(), batches, rank=4, target_modules=["inner"])
    batches[0]["attention_mask"] = torch.ones(3, 12)
    nslora_dist.calibrate(Prepending(), batches, rank=4, target_modules=["inner"])


def test_an_8_bit_weight_is_refused_before_the_first_pass_or_not_read() -> None:
    model, batches, targets = llama()
    bnb = pytest.importorskip("bitsandbytes")
    for name, linear in [(n, m) for n, m in model.named_modules() if n.endswith("q_proj")]:
        packed = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        packed.load_state_dict(linear.state_dict())
        model.set_submodule(name, packed.to("cpu"))
    ran: list[int] = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(UserError, match=r"weight of .*q_proj is int8 \(Linear8bitLt\), which a_init 'projected'"):
        nslora_dist.calibrate(model, batches, rank=4, target_modules=targets, a_init="projected")
    assert not ran
    nslora_dist.calibrate(model, batches, rank=4, target_modules=targets, a_init="orthonormal")


def test_a_new_head_may_train_beside_the_adapter(tmp_path: Path) -> None:
    _, batches, targets = llama()
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=99, pad_token_id=0, **SMALL))
    nslora_dist.calibrate(model, batches, rank=6, folder=tmp_path / "n", target_modules=targets)
    peft = get_peft_model(model, LoraConfig(r=6, target_modules=targets, task_type="SEQ_CLS"))
    assert nslora_dist.init_peft(peft, tmp_path / "n")


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_the_caller_s_matmul_precision_rounds_nothing(precision: str, tmp_path: Path) -> None:
    """Under it Uᵀ G U of a leak of 1e-5 was noise, where the processor has such products (AMX) or the GPU (TF32)."""
    torch.manual_seed(0)
    model, batches, targets = llama()
    expected = nslora_dist.calibrate(model, batches, rank=6, target_modules=targets)
    before = torch.get_float32_matmul_precision()
    asked: list[str] = []
    plain = nslora_dist.live_calibration.gram_in_basis

    def watched(gram: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        asked.append(torch.get_float32_matmul_precision())
        return plain(gram, basis)

    try:
        torch.set_float32_matmul_precision(precision)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nslora_dist.live_calibration.gram_in_basis", watched)
            nslora_dist.calibrate(model, batches, rank=6, target_modules=targets)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked == ["highest"] * len(expected.manifest["groups"])


def test_each_module_keeps_its_own_mode() -> None:
    model, batches, targets = llama()
    model.train()
    model.get_submodule("model.layers.0").eval()
    before = {name: module.training for name, module in model.named_modules()}
    nslora_dist.calibrate(model, batches, rank=6, target_modules=targets)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_model_without_linears_is_refused(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    batches = [{"input_ids": torch.randint(0, 50, (2, 9))}]
    with pytest.raises(UserError, match=r"GPT2LMHeadModel has no nn\.Linear .* its layers are Conv1D"):
        nslora_dist.calibrate(model, batches, rank=3, folder=tmp_path / "n")
    with pytest.raises(UserError, match=r"no linear 'c_attn'.* its layers are Conv1D"):
        nslora_dist.calibrate(model, batches, rank=3, folder=tmp_path / "n", target_modules=["c_attn"])
    assert not (tmp_path / "n").exists()


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    """Its attention_mask is the encoder's alone: the decoder's padding would be summed, or the wrong tokens."""
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4))
    batch = {"input_ids": torch.randint(0, 50, (2, 9)), "decoder_input_ids": torch.randint(0, 50, (2, 5))}
    for wrapped in (model, Wrapper(model)):
        with pytest.raises(UserError, match=r"in an encoder-decoder model attention_mask is the encoder's alone"):
            nslora_dist.calibrate(wrapped, [batch], rank=3, folder=tmp_path / "n")


def test_linears_that_do_not_run_are_named() -> None:
    model, batches, _ = llama()
    model.add_module("idle", nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"through none of the 1 linears chosen \(idle, "):
        nslora_dist.calibrate(model, batches, rank=3, target_modules=["idle"])
    with pytest.raises(UserError, match="target_modules is empty"):
        nslora_dist.calibrate(model, batches, rank=3, target_modules=[])


def test_bad_input(tmp_path: Path) -> None:
    model, batches, _ = llama()
    with pytest.raises(UserError, match="generator"):
        nslora_dist.calibrate(model, iter(batches), rank=6)
    with pytest.raises(UserError, match="no linear 'q_porj' \\(did you mean 'q_proj'\\?\\)"):
        nslora_dist.calibrate(model, batches, rank=6, target_modules=["q_porj"])
    with pytest.raises(UserError, match="target_modules 'q_proj' is one text; give a list"):
        nslora_dist.calibrate(model, batches, rank=6, target_modules="q_proj")
    with pytest.raises(UserError, match=r"a_init 'project' \(did you mean 'projected'\?\); there is orthonormal and"):
        nslora_dist.calibrate(model, batches, rank=6, a_init="project")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="method 'fats' .*there is fast and eigh"):
        nslora_dist.calibrate(model, batches, rank=6, method="fats")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="rank 0; give 1 or more"):
        nslora_dist.calibrate(model, batches, rank=0)
    with pytest.raises(UserError, match="a batch is a list; wanted are mappings"):
        nslora_dist.calibrate(model, [[torch.zeros(1), torch.zeros(1)]], rank=6)
    with pytest.raises(UserError, match="rank 65 is above the 64 inputs"):
        nslora_dist.calibrate(model, batches, rank=65)
    with pytest.raises(UserError, match="there are no batches"):
        nslora_dist.calibrate(model, [], rank=6)
    (tmp_path / "n").mkdir()
    with pytest.raises(UserError, match="exists already"):
        nslora_dist.calibrate(model, batches, rank=6, folder=tmp_path / "n")
    with pytest.raises(UserError, match="no LoRA layers"):
        nslora_dist.calibrate(model, batches, rank=6, folder=tmp_path / "m")
        nslora_dist.init_peft(model, tmp_path / "m")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"inputs of model.layers.1.mlp.down_proj are not finite"):
        nslora_dist.calibrate(model, batches, rank=6, target_modules=["down_proj"])


def test_what_peft_thaws_is_found_and_frozen_again(tmp_path: Path) -> None:
    """PEFT sets A to be trained again on leaving disable_adapter; then what A reads is no null space any more."""
    torch.manual_seed(0)
    model, batches, targets = llama()
    nslora_dist.calibrate(model, batches, rank=6, folder=tmp_path / "n", target_modules=targets)
    peft = get_peft_model(model, LoraConfig(r=6, target_modules=targets))
    layers = nslora_dist.init_peft(peft, tmp_path / "n")
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["default"].weight.normal_()
    found = nslora_dist.peft_interference(peft, tmp_path / "n")
    with peft.disable_adapter():
        peft(**batches[0])
    some = next(iter(layers.values()))
    assert some.lora_A["default"].weight.requires_grad
    nslora_dist.init_peft(peft, tmp_path / "n", keep_b=True)
    assert not any(layer.lora_A["default"].weight.requires_grad for layer in layers.values())
    assert nslora_dist.peft_interference(peft, tmp_path / "n") == found
    before = some.lora_A["default"].weight.clone()
    for through in (torch.bfloat16, torch.float16):  # saved and loaded in 16 bits it is still the null space's
        some.lora_A["default"].weight.data.copy_(before.to(through))
        nslora_dist.peft_interference(peft, tmp_path / "n")
    some.lora_A["default"].weight.data.copy_(before * (1 + 1e-3))
    with pytest.raises(UserError, match=r"the lora_A of .* is not the null space's.*call init_peft after them"):
        nslora_dist.peft_interference(peft, tmp_path / "n")


@pytest.mark.parametrize("a_init", ["orthonormal", "projected"])
def test_the_caller_s_autocast_rounds_nothing(a_init: Any, tmp_path: Path) -> None:
    """Under it Uᵀ G U came out in 16 bits, and the null space could not be read again."""
    torch.manual_seed(0)
    model, batches, targets = llama()
    with torch.autocast("cpu", torch.bfloat16):
        space = nslora_dist.calibrate(
            model, batches, rank=6, folder=tmp_path / "n", target_modules=targets, a_init=a_init
        )
        peft = get_peft_model(model, LoraConfig(r=6, target_modules=targets))
        layers = nslora_dist.init_peft(peft, tmp_path / "n")
        nslora_dist.peft_interference(peft, tmp_path / "n")
    for name, start in space.starts(layers, device=torch.device("cpu")):
        assert torch.equal(layers[name].lora_A["default"].weight, start.a)
    assert {tensor.dtype for tensor in space.tensors.values()} == {torch.float32}


def test_wrapped_and_inferring_models_and_lists_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches, targets = llama()
    tensors = [[batch["input_ids"]] for batch in batches]  # as a DataLoader of a TensorDataset gives them
    with torch.inference_mode():
        space = nslora_dist.calibrate(model, tensors, rank=6, folder=tmp_path / "n", target_modules=targets)
    named = nslora_dist.calibrate(model, batches, rank=6, target_modules=targets)
    assert space.manifest["groups"].keys() == named.manifest["groups"].keys()
    peft = get_peft_model(model, LoraConfig(r=6, target_modules=targets))
    compiled = Wrapper(torch.compile(peft))  # not run, so not compiled
    layers = nslora_dist.init_peft(compiled, tmp_path / "n")
    assert layers.keys() == space.manifest["modules"].keys()


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(DOCS / "peft_example.py"), run_name="__main__")
    assert "largest interference 0." in capsys.readouterr().out
