"""The dial on a frozen random A through the whole pipeline: report, card, curve, resume, and what a checkpoint asks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.resume_run import recipe_of
from helpers.stages import CPU, dense_energies, plain_base, started
from helpers.world import make_base, make_texts
from nslora_dist.adapter import adapted_linears
from nslora_dist.calibration.store import MIXTURE
from nslora_dist.effects import measure_frozen_a
from nslora_dist.errors import UserError
from nslora_dist.pipeline import Run

LIMIT = 0.01
"""Less than half of what two steps come to without a budget."""
DIAL = {"method": "lora", "freeze_a": True, "rank": 5, "interference_budget": LIMIT, "budget_over": "total"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_texts(tmp_path_factory.mktemp("frozen"))
    make_base(folder / "llama")
    return folder


def recipe(world: Path, name: str, steps: int = 2, **changes: Any) -> Any:
    train = {"epochs": None, "max_steps": steps, "schedule": "constant", "warmup_ratio": 0.0}
    return recipe_of("single-1", world, world / name, {"train": train, "adapter": DIAL} | changes)


def test_c_is_that_of_the_inputs(world: Path) -> None:
    """A G Aᵀ and tr(W G Wᵀ) by the pass before training, against the plain model's own activations in float64."""
    with started(recipe(world, "c")) as stage:
        measure_frozen_a(stage.engine, stage.run.texts, batch_size=4, device=CPU)
        modules = adapted_linears(stage.engine.model)
        by_name = {text.name: text for text in stage.run.texts}
        whole = {name: (module.lora_A.detach().double(), module) for name, module in modules.items()}
    base = plain_base(world / "llama", dtype="float32").double()
    mixed: dict[str, torch.Tensor] = {}
    for source, text in by_name.items():
        # ΔW = A (its rows as outputs), so Σ‖A x‖² is the trace; and a random b gives b C bᵀ.
        b = {name: torch.randn(1, 5, generator=torch.Generator().manual_seed(1)).double() for name in whole}
        found = dense_energies(base, {name: b[name] @ a for name, (a, _) in whole.items()}, text.calibration)
        for name, (_, module) in whole.items():
            energy = (b[name] @ module.update_grams[source].double() @ b[name].T).item()
            assert energy == pytest.approx(found[name].update, rel=1e-4)  # float32 activations against float64
            assert module.references[source] == pytest.approx(found[name].output, rel=1e-4)
            if text.weight is not None:
                share = text.weight / found[name].input
                sums = torch.tensor([share * found[name].update, share * found[name].output], dtype=torch.float64)
                mixed[name] = mixed[name] + sums if name in mixed else sums
    assert {text.name for text in by_name.values() if text.weight is None} == {"p"}
    for name, (_, module) in whole.items():
        energy = (b[name] @ module.update_grams[MIXTURE].double() @ b[name].T).item()
        assert energy == pytest.approx(float(mixed[name][0]), rel=1e-4)
        assert module.references[MIXTURE] == pytest.approx(float(mixed[name][1]), rel=1e-4)


def test_the_whole_way(world: Path) -> None:
    report = Run(
        recipe(world, "whole", evaluation={"baselines": {"free": {"adapter": {"interference_budget": None}}}}), CPU
    ).train()
    budget = report["interference"]["budget"]
    assert budget == {"limit": LIMIT, "over": "total", "final": pytest.approx(LIMIT, rel=1e-6)}
    assert report["interference"]["rms"] == pytest.approx(LIMIT, rel=1e-3)
    without = report["interference_by_arm"]["free"]
    assert "budget" not in without and without["rms"] > 2 * LIMIT
    card = (world / "whole" / "adapter" / "README.md").read_text()
    assert "| LoRA, random A frozen | " in (world / "whole" / "report.md").read_text(), "not plain LoRA"
    assert f"within a budget of {LIMIT:g} for the root mean square over modules" in card
    events = b"".join(path.read_bytes() for path in (world / "whole" / "tensorboard" / "lora_frozen_a").iterdir())
    assert b"interference_budget/spent" in events and b"interference/p_max" in events, "known while it trains"


def test_a_checkpoint_belongs_to_the_texts_that_c_was_measured_on(world: Path) -> None:
    Run(recipe(world, "texts"), CPU).train()
    manifest = json.loads((world / "texts" / "checkpoints" / "step-2" / "manifest.json").read_text())
    assert "texts" in manifest["belongs_to"]
    changed = recipe(world, "texts", calibration={"samples": 10})
    for left in (world / "texts" / "arms").glob("lora*.json"):
        left.unlink()
    with pytest.raises(UserError, match="texts"):
        Run(changed, CPU).train()
