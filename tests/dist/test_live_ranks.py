"""``calibrate`` and ``init_peft`` on models that are sharded, or in 4 bits, when they come."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.ranks import run_ranks
from helpers.stages import as_bytes

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
RANK = 6


def make(folder: Path | None = None, **more: Any) -> nn.Module:
    """The same toy LLaMA on every rank, from a folder where it is to be packed to 4 bits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if folder is not None:
        return LlamaForCausalLM.from_pretrained(folder, **more)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=99, use_cache=False, **sizes, **more))


def texts() -> list[dict[str, Tensor]]:
    dice = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 99, (2, 30), generator=dice)} for _ in range(8)]


def adapted(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))


def shard(model: nn.Module, kind: str) -> tuple[nn.Module, nn.Module]:
    """(what is called, the model inside)."""
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for block in [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if kind == "zero3":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
        # Without the threshold every parameter of so small a model would stay whole on every rank.
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        config = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 2}
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
        return engine, model
    return model, model


def calibrate_live(kind: str, folder: Path, a_init: Any) -> dict[str, Any]:
    import nslora_dist
    from nslora_dist import dist

    called, inner = shard(make(attention_bias=True), kind)
    mine = texts()[dist.rank() :: dist.world_size()]
    held: set[str] = set()
    # The head is the last to run: what is whole there is its own, or was not released.
    watching = inner.lm_head.register_forward_pre_hook(lambda *_: held.update(whole_under_zero3(inner)))
    space = nslora_dist.calibrate(called, mine, rank=RANK, target_modules=TARGETS, a_init=a_init, folder=folder)
    watching.remove()
    external = [name for name, module in inner.named_modules() if getattr(module, "_external_params", None)]
    return {**space.manifest, "held": held - {"lm_head.weight"}, "external": external}


def whole_under_zero3(model: nn.Module) -> set[str]:
    """Names of the parameters that ZeRO-3 holds whole at this moment."""
    states = {name: getattr(parameter, "ds_status", None) for name, parameter in model.named_parameters()}
    return {name for name, state in states.items() if state is not None and state.name == "AVAILABLE"}


@pytest.mark.parametrize("a_init", ["orthonormal", "projected"])
def test_sharded_calibration_is_the_whole_models(tmp_path: Path, a_init: str) -> None:
    from nslora_dist.calibration import store

    (alone,) = run_ranks(calibrate_live, 1, "whole", tmp_path / "whole", a_init)
    reference = store.load(tmp_path / "whole")
    for kind in ("fsdp2", "zero3"):
        for found in run_ranks(calibrate_live, 2, kind, tmp_path / kind, a_init):
            assert found["groups"].keys() == alone["groups"].keys()
            assert found["held"] == set() and found["external"] == []
            for name, entry in alone["modules"].items():
                mine = found["modules"][name]
                assert mine["references"]["calibration"] == pytest.approx(entry["references"]["calibration"], rel=1e-5)
        space = store.load(tmp_path / kind)
        for name in reference.tensors:
            # One order of summing tokens or another: float32 Grams differ by about 1e-7, the starts with them.
            if name.endswith(".basis"):
                overlap = reference.tensors[name].T @ space.tensors[name]
                assert torch.linalg.svdvals(overlap).min() > 1 - 1e-4, f"{kind} {name}"
        device = torch.device("cpu")
        ours, theirs = (dict(s.starts(alone["modules"], device=device)) for s in (space, reference))
        for name in ours:
            assert torch.allclose(ours[name].a.T @ ours[name].a, theirs[name].a.T @ theirs[name].a, atol=1e-3), name


def refused(folder: Path) -> str:
    """What a rank is told of a folder that rank 0 alone finds."""
    import nslora_dist
    from nslora_dist import dist
    from nslora_dist.errors import UserError

    with pytest.raises(UserError) as caught:
        nslora_dist.calibrate(make(), texts(), rank=RANK, folder=folder if dist.is_main() else folder / "none")
    return str(caught.value)


def test_a_folder_that_exists_ends_every_rank(tmp_path: Path) -> None:
    assert all("exists already" in said for said in run_ranks(refused, 2, tmp_path, timeout=120.0))


def start_live(kind: str, folder: Path, base: Path) -> dict[str, Any]:
    """A sharded PEFT model, started; whole factors, which of them train, and whether the function is the base's."""
    import nslora_dist
    from nslora_dist.peft_start import whole

    ids = texts()[0]["input_ids"]
    if kind == "nf4":
        from transformers import BitsAndBytesConfig

        packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        model = make(base, quantization_config=packed)
    else:
        model = make()
    model.eval()
    with torch.no_grad():  # as below: on some processors bitsandbytes rounds otherwise where no gradient is asked for
        before = model(input_ids=ids).logits
    peft = adapted(model).eval()
    called, inner = shard(peft, kind)
    layers = nslora_dist.init_peft(called, folder)
    factors = {name: whole(layer.lora_A["default"].weight).float() for name, layer in layers.items()}
    zero = all(not whole(layer.lora_B["default"].weight).any() for layer in layers.values())
    trains = {n.rsplit(".", 3)[1] for n, p in inner.named_parameters() if p.requires_grad}
    with torch.no_grad():
        after = called(input_ids=ids).logits
    found = nslora_dist.peft_interference(called, folder)["calibration"]
    return {
        "factors": {name: as_bytes(value) for name, value in factors.items()},
        "zero": zero,
        "trains": trains,
        "moved": float((after - before).abs().max()),
        "interference": max(found.values()),
    }


@pytest.mark.parametrize("kind", ["whole", "fsdp2", "zero3", "nf4"])
def test_a_sharded_peft_model_starts_in_the_null_space(tmp_path: Path, kind: str) -> None:
    from nslora_dist.calibration import store

    make().save_pretrained(tmp_path / "base")
    run_ranks(calibrate_live, 1, "whole", tmp_path / "null_space", "projected")
    space = store.load(tmp_path / "null_space")
    starts = dict(space.starts(space.manifest["modules"], device=torch.device("cpu")))
    for found in run_ranks(
        start_live, 1 if kind in ("whole", "nf4") else 2, kind, tmp_path / "null_space", tmp_path / "base"
    ):
        assert found["factors"].keys() == starts.keys()
        for name, start in starts.items():
            assert torch.equal(found["factors"][name], as_bytes(start.a)), f"{kind} {name}"
        assert found["zero"] and found["trains"] == {"lora_B"} and found["interference"] == 0.0
        assert found["moved"] < 1e-5
