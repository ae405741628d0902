"""Null-LoRA after training: what every engine exports lies in the null space of the weight that it computed with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.parity_run import CASES, ENGINES, Found
from helpers.stages import plain_base
from nslora_dist.export import module_scale, read_adapter

Results = dict[str, dict[str, Found]]
MINE = [case for case in CASES if case.startswith("null_lora")]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", MINE)
def test_products_with_the_retained_subspaces_vanish(found: Results, world: Path, engine: str, case: str) -> None:
    """ΔW Q = 0 and Pᵀ ΔW = 0 for every singular vector of W above the threshold, by a float64 decomposition of W.

    The exported factors are float32 in every dtype of training: a few units of 1e-7, times what the singular vectors
    of nearly equal singular values on either side of the threshold are mixed by.
    """
    settings: dict[str, Any] = CASES[case].changes["base_model"]
    threshold = CASES[case].changes["adapter"]["null_threshold"]
    base = plain_base(
        world / "llama", dtype=settings.get("dtype", "float32"), quantised="quantization" in settings
    ).double()
    factors, config = read_adapter(found[engine][case].adapter)
    worst = 0.0
    for name, pair in factors.items():
        scale = module_scale(config, name, pair.rank)
        assert scale == pytest.approx(found[engine][case].scale)
        update = scale * pair.lora_b.double() @ pair.lora_a.double()
        p, s, q = torch.linalg.svd(base.get_submodule(name).weight.detach())
        retained = int((s > threshold * s[0]).sum())
        assert retained >= 16
        norms = (update @ q[:retained].T).norm(), (p[:, :retained].T @ update).norm()
        worst = max(worst, *(float(norm / update.norm()) for norm in norms))
        assert (
            torch.linalg.matrix_rank(update, rtol=1e-5) == pair.rank == 2 * len(found[engine][case].factors[name]["A"])
        )
    assert worst < 2e-6


@pytest.mark.parametrize("case", MINE)
def test_ranks_follow_the_nullity(found: Results, world: Path, case: str) -> None:
    """Uneven ranks at 0.3; at 0.23 something is left out, and what is left of its kind is named in full."""
    _, config = read_adapter(found["single"][case].adapter)
    ranks = {name: 2 * len(parts["A"]) for name, parts in found["single"][case].factors.items()}
    kinds = {name.rsplit(".", 1)[1] for name in found["single"]["lora"].factors}
    if case == "null_lora_nf4":
        missing = {name.rsplit(".", 1)[1] for name in found["single"]["lora"].factors.keys() - ranks.keys()}
        assert 0 < len(missing) < 7
        in_full = {name for name in ranks if name.rsplit(".", 1)[1] in missing}
        assert in_full and set(config["target_modules"]) == (kinds - missing) | in_full
    else:
        assert len(ranks) == 14 and len(set(ranks.values())) > 1 and max(ranks.values()) == 8
        assert set(config["target_modules"]) == kinds


@pytest.mark.parametrize("case", MINE)
def test_trains_what_a_lora_of_half_the_rank_would(found: Results, case: str) -> None:
    for parts in found["single"][case].factors.values():
        half, d_in, d_out = len(parts["A"]), len(parts["V"]), len(parts["U"])
        assert parts["A"].shape == (half, d_in) and parts["B"].shape == (d_out, half)
    frozen = found["single"][case].before
    assert not any(name.endswith(("lora_A", "lora_B")) for name in frozen)
    assert sum(name.endswith(("null_in", "null_out")) for name in frozen) == 2 * len(found["single"][case].factors)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
@pytest.mark.parametrize("case", MINE)
def test_every_engine_found_the_same_null_spaces(found: Results, world: Path, engine: str, case: str) -> None:
    """Each decomposed in a run of its own, rank 0 alone or (ZeRO-3) spread over ranks; from there to every shard."""
    one, other = (
        load_file(next((world / name / case / "weight_null_space").glob("*/weight_null_space.safetensors")))
        for name in ("single", engine)
    )
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
