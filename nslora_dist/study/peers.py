"""PiSSA, CorDA and EVA as PEFT initialises them, trained by this project's own loop like every other arm.

PEFT's code decides A₀ and B₀; PiSSA's and CorDA's residual base W − s B₀A₀ is what the residual form computes without
rewriting W, and EVA's B₀ is zero, which is the delta form. So a cell of a peer has the function and the gradients that
PEFT's own model has (``tests/unit/test_study_peers.py`` trains both), with the same rows, optimizer, schedule and
measurements as the rest.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from nslora_dist.adapter import AdaptedLinear
from nslora_dist.base_weights import fill_unit
from nslora_dist.batches import Batch
from nslora_dist.engines.base import Job
from nslora_dist.recipe_adapter import LINEAR_TARGETS

PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeerStart:
    """What PEFT starts a module from: A₀ (r, d_in), B₀ (d_out, r) or None where it is zero, and alpha / rank."""

    a: Tensor
    b: Tensor | None
    scale: float


def peft_model(
    base: Path,
    peer: Literal["pissa", "corda", "eva"],
    *,
    rank: int,
    sequences: Sequence[Tensor],
    batches: Sequence[Batch],
    device: torch.device,
) -> nn.Module:
    """PEFT's own model, started by PEFT's own code.

    Args:
        base: the base's folder.
        peer: which initialisation. CorDA in its knowledge-preserved mode, EVA with PEFT's defaults (its ranks are
            spread over modules by explained variance, up to twice the rank).
        rank: r; EVA's on average.
        sequences: of knowledge to keep, (s,) each, for CorDA: the calibration's sources.
        batches: of the new task, for EVA.
        device: where it is made.
    """
    model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    model.to(device)
    settings: dict[str, dict[str, Any]] = {
        "pissa": {},
        "corda": {"corda_config": CordaConfig(corda_method="kpm")},
        "eva": {"eva_config": EvaConfig()},
    }
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(LINEAR_TARGETS),
        init_lora_weights=peer,
        lora_dropout=0.0,
        **settings[peer],
    )
    if peer == "corda":

        def read_all() -> None:
            for ids in sequences:  # one at a time: PEFT's hook takes a sequence, and knows no padding
                model(input_ids=ids[None].to(device))

        preprocess_corda(model, config, run_model=read_all)
    made: Any = get_peft_model(model, config)
    if peer == "eva":
        fed = [
            {
                "input_ids": batch.input_ids,
                "attention_mask": torch.ones_like(batch.input_ids)
                if batch.attention_mask is None
                else batch.attention_mask,
                "labels": batch.labels,
            }
            for batch in batches
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line a layer whose batch is too small
            initialize_lora_eva_weights(made, fed, show_progress_bar=False, gather_distributed_inputs=False)
    return made


def peer_starts(model: nn.Module) -> dict[str, PeerStart]:
    """Module name in the bare base → what PEFT's model starts it from; modules that EVA gave no rank are not there."""
    found = {}
    for name, layer in model.named_modules():
        adapters = getattr(layer, "lora_A", None)
        if not isinstance(adapters, nn.ModuleDict) or "default" not in adapters:
            continue
        a = layer.lora_A["default"].weight.detach().float().cpu().clone()
        b = layer.lora_B["default"].weight.detach().float().cpu().clone()
        zero = not bool(b.any())
        found[name.removeprefix(PREFIX)] = PeerStart(a, None if zero else b, float(layer.scaling["default"]))
    return found


def peer_job(empty: PreTrainedModel, starts: dict[str, PeerStart], checkpoint: Any, *, device: torch.device) -> Job:
    """The base with PEFT's starts on it, A and B both trained, as a job of this project's engines."""
    for name, start in starts.items():
        rank, width = start.a.shape
        base = empty.get_submodule(name)
        made = AdaptedLinear(
            base,
            name=name,
            in_features=width,
            out_features=int(base.out_features),  # type: ignore[arg-type]
            rank=rank,
            scale=start.scale,
            freeze_a=False,
            residual=start.b is not None,
            dtype=torch.float32,
        )
        empty.set_submodule(name, made)

    def fill(unit: nn.Module, name: str) -> None:
        fill_unit(unit, name, checkpoint, device=device)
        for module in unit.modules():
            if isinstance(module, AdaptedLinear):
                module.fill(starts[module.name].a, starts[module.name].b, device=device)

    filling: Callable[[nn.Module, str], None] = fill
    return Job(model=empty, fill=filling, device=device)
