"""Fewer rows than ranks, than a global batch or than a micro-batch; and a token to predict in every global batch."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_tools import bpe, data_section, offline, samples_of, train_section, write_jsonl, write_pairs

from nslora_dist.data import TrainingData
from nslora_dist.errors import UserError

__all__ = ["offline"]  # a fixture for every test here


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("count", "micro", "size"), [(1, 1, 8), (3, 1, 8), (3, 4, 16), (7, 2, 8), (9, 1, 8)])
def test_each_sample_once_per_epoch(tmp_path: Path, packing: bool, count: int, micro: int, size: int) -> None:
    path = write_pairs(tmp_path / "a.jsonl", count)
    train = train_section(epochs=3.0, global_batch_size=size, micro_batch_size=micro)
    data = TrainingData.load(data_section(path, packing=packing, max_length=40), train, bpe())
    assert data.samples == count and data.total_steps == 3 * data.steps_per_epoch
    everything = {(tuple(data._samples.ids(i).tolist()), tuple(data._samples.labels(i).tolist())) for i in range(count)}
    for world_size in [n for n in (1, 2, 4, 8, 16) if size % (micro * n) == 0]:
        for epoch in range(3):
            seen = []
            for step in range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch):
                ranks = [data.micro_batches(step, rank=r, world_size=world_size) for r in range(world_size)]
                assert {len(batches) for batches in ranks} == {size // (micro * world_size)}
                assert all(1 <= len(b.input_ids) <= micro for batches in ranks for b in batches)
                assert sum(b.supervised_tokens for batches in ranks for b in batches) > 0
                seen += [s for batches in ranks for b in batches for s in samples_of(b)]
            assert len(seen) == count and set(seen) == everything


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=9),
    max_length=st.integers(1, 24),
    micro=st.sampled_from([1, 2]),
    packing=st.booleans(),
)
def test_every_global_batch_has_a_token_to_predict(
    words: list[tuple[int, int]], max_length: int, micro: int, packing: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"prompt": "the " * prompt, "response": " river" * response} for prompt, response in words]
        path = write_jsonl(Path(folder) / "a.jsonl", rows)
        train = train_section(global_batch_size=4, micro_batch_size=micro)
        try:
            data = TrainingData.load(data_section(path, max_length=max_length, packing=packing), train, bpe())
        except UserError as error:
            assert "raise max_length" in str(error)
            return
    for step in range(data.steps_per_epoch):
        for world_size in (1, 2):
            batches = [b for r in range(world_size) for b in data.micro_batches(step, rank=r, world_size=world_size)]
            assert sum(b.supervised_tokens for b in batches) > 0
    assert data._samples.supervised.min() >= 1


def test_a_sample_without_a_token_to_predict_is_refused(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl", 3)
    section, train = data_section(path), train_section()
    samples = TrainingData.load(section, train, bpe())._samples
    for prompts in (samples.lengths, np.array([1, samples.lengths[1], 1])):
        with pytest.raises(UserError, match="a sample without a token to predict"):
            TrainingData(replace(samples, prompt_lengths=prompts), section, train, pad=0)
    nothing = replace(
        samples, tokens=samples.tokens[:0], offsets=np.array([0]), prompt_lengths=samples.prompt_lengths[:0]
    )
    with pytest.raises(UserError, match="a sample without a token to predict"):
        TrainingData(nothing, section, train, pad=0)
