"""Cells of PEFT's methods are what PEFT's own model does: the same function, and the same training."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from nslora_dist.adapter import adapted_linears
from nslora_dist.engines import start_engine
from nslora_dist.study.bases import make_base
from nslora_dist.study.bench import Bench
from nslora_dist.study.cell import _Silent
from nslora_dist.study.cells import Cell, cells_of
from nslora_dist.study.peers import peft_model
from nslora_dist.study.spec import STUDIES, load_study
from nslora_dist.trainer import learning_rate, train

STEPS = 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("study")
    tree = yaml.safe_load((STUDIES / "quick.yaml").read_text())
    tree["training"]["steps"] = {"new_facts": STEPS}
    tree["sizes"]["toy"]["pretraining"]["steps"] = 20
    tree["arms"] = {
        peer: {"peer": peer, "rank": 4, "matched": "parameters", "learning_rates": [1e-2], "weight_decays": [0.3]}
        for peer in ("pissa", "corda", "eva")
    }
    own = {"sizes": ["toy"], "tasks": ["new_facts"], "calibrations": ["all"], "arms": list(tree["arms"])}
    tree["grids"] = {"peers": own}
    (folder / "peers.yaml").write_text(yaml.safe_dump(tree))
    study = load_study(str(folder / "peers.yaml"), folder)
    made = make_base(study, "toy", device=CPU)
    assert make_base(study, "toy", device=CPU) == made  # the second call finds it
    return Bench(study, "toy", device=CPU)


def cell_of(bench: Bench, peer: str) -> Cell:
    return next(cell for cell in cells_of(bench.study) if cell.arm == peer)


def peft_losses(model: nn.Module, bench: Bench, cell: Cell) -> list[float]:
    """A loop of its own, in plain PyTorch and with PEFT's model."""
    recipe, data = bench.recipe(cell), bench.data(cell)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=recipe.train.weight_decay, betas=(0.9, 0.999))
    model.train()
    losses = []
    for step in range(STEPS):
        (batch,) = data.micro_batches(step, rank=0, world_size=1)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, recipe.train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total=STEPS, train=recipe.train)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("peer", ["pissa", "corda", "eva"])
def test_a_peers_cell_trains_as_pefts_own_model(bench: Bench, peer: Any) -> None:
    cell = cell_of(bench, peer)
    data = bench.data(cell)
    sequences = [s for text in bench.texts(cell) if text.weight is not None for s in text.calibration]
    batches = [b for step in range(STEPS) for b in data.micro_batches(step, rank=0, world_size=1)]
    torch.manual_seed(cell.seed)
    theirs = peft_model(bench.folder / "base", peer, rank=4, sequences=sequences, batches=batches, device=CPU)
    engine = start_engine(bench.job(cell), bench.recipe(cell))
    own = adapted_linears(engine.model)
    ranks = {name: layer.lora_A.shape[0] for name, layer in own.items()}
    if peer == "eva":
        assert sum(ranks.values()) == 4 * 14 and len(set(ranks.values())) > 1  # EVA spreads its ranks
    else:
        assert set(ranks.values()) == {4} and len(ranks) == 14
    expected = peft_losses(theirs, bench, cell)
    found = train(engine, data, bench.recipe(cell).train, device=CPU, scalars=_Silent()).losses
    assert expected[-1] < expected[0] - 0.05  # it learns: a start that is off would show
    assert found == pytest.approx(expected, rel=2e-4)


def test_a_peer_starts_as_the_base(bench: Bench) -> None:
    for peer in ("pissa", "corda", "eva"):
        cell = cell_of(bench, peer)
        engine = start_engine(bench.job(cell), bench.recipe(cell))
        (batch,) = bench.data(cell).micro_batches(0, rank=0, world_size=1)
        plain: Any = peft_model(Path(bench.folder) / "base", "pissa", rank=1, sequences=[], batches=[], device=CPU)
        plain.train()
        with torch.no_grad():
            whole = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
            loss = engine.forward(batch) / batch.supervised_tokens
        assert float(loss) == pytest.approx(float(whole), rel=1e-4)
