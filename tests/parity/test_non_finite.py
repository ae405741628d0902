"""A loss that is not finite ends training on every rank with one message: step, module, rank, micro-batch, row."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.parity_run import ENGINES, non_finite
from helpers.ranks import run_ranks
from helpers.world import change_weights, tokenizer

WORD = "w60"


def poison_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"][5, 3] = torch.nan


def poison_token(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"][tokenizer().convert_tokens_to_ids(WORD), 7] = torch.inf


@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_says_where(world: Path, tmp_path: Path, engine: str) -> None:
    for name in ("task.jsonl", "a.jsonl", "b.jsonl", "p.jsonl"):
        (tmp_path / name).write_bytes((world / name).read_bytes())
    (tmp_path / "llama").symlink_to(world / "llama")
    change_weights(world / "llama", tmp_path / "poisoned_head", poison_head)
    change_weights(world / "llama", tmp_path / "poisoned_token", poison_token)
    first, *others = run_ranks(non_finite, ENGINES[engine], engine, tmp_path)
    assert all(other == first for other in others), "ranks tell different stories"

    three = r"step 2 and the 2 after it: .*module model\.layers\.\d.*learning_rate"
    assert re.search(three, first["rate"]), first["rate"]
    assert re.search(r"step 1: .*rank 0, micro-batch 0, row \d, module lm_head", first["head"]), first["head"]
    # 16 rows of equal length, 8 a step: the poisoned one is in one of the first two steps, on whatever rank.
    found = re.search(
        r"step ([12]): .*rank (\d), micro-batch (\d), row (\d), module model\.embed_tokens", first["token"]
    )
    assert found, first["token"]
    step, rank, micro_batch, row = map(int, found.groups())
    assert bad_place(tmp_path, ENGINES[engine]) == (step - 1, rank, micro_batch, row)


def bad_place(folder: Path, ranks: int) -> tuple[int, int, int, int]:
    """Where the batches put the row with the poisoned word."""
    from helpers.world import make_recipe
    from nslora_dist.data import TrainingData
    from nslora_dist.rows import load_tokenizer

    recipe = make_recipe(folder, folder / "llama", folder / "unused", data={"path": str(folder / "one_bad_row.jsonl")})
    data = TrainingData.load(recipe.data, recipe.train, load_tokenizer(recipe.base_model))
    bad = tokenizer().convert_tokens_to_ids(WORD)
    for step in range(2):
        for rank in range(ranks):
            for number, batch in enumerate(data.micro_batches(step, rank=rank, world_size=ranks)):
                rows = (batch.input_ids == bad).any(1).nonzero()
                if len(rows):
                    return step, rank, number, int(rows[0])
    raise AssertionError("the poisoned row is nowhere")
