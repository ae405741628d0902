"""Of DeepSpeed's settings only those are taken with which training is known to be right; the shipped files are."""

import json
from pathlib import Path
from typing import Any

import pytest

from nslora_dist.errors import UserError
from nslora_dist.recipe_file import load_recipe


def load(path: Path) -> None:
    load_recipe("tiny_math", ["engine.name=zero3", f"engine.config={path}"])


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (True, " is True; it must hold an object"),
        ({"stage3_use_all_reduce_for_fetch_params": True}, "_params gathers by adding shards up"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights rounds every weight"),
        ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights rounds the base"),
        ({"zero_quantized_gradients": True}, "zero_quantized_gradients rounds gradients"),
        ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size keeps a second copy"),
        ({"memory_efficient_linear": True}, "memory_efficient_linear replaces"),
        ({"round_robin_gradients": True}, "round_robin_gradients: training is not known to be right with it"),
        ({"reduce_buckets_size": 5}, "(did you mean 'reduce_bucket_size'?)"),
        ({"reduce_bucket_size": "auto"}, "reduce_bucket_size is 'auto'; it must be a number of elements from 1"),
        ({"reduce_bucket_size": 0}, "reduce_bucket_size is 0; it must be a number of elements from 1"),
        ({"stage3_max_live_parameters": 0.5}, "stage3_max_live_parameters is 0.5; it must be"),
        ({"sub_group_size": True}, "sub_group_size is True; it must be"),
        ({"overlap_comm": "yes"}, "overlap_comm is 'yes'; it must be true or false"),
        ({"offload_param": "cpu"}, "offload_param is 'cpu'; it must hold an object"),
        ({"offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device is 'nvme'; it must be 'cpu' or 'none'"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio: only device and pin_memory"),
        ({"offload_param": {"device": "cpu", "pin_memory": 1}}, "offload_param.pin_memory is 1; it must be true or"),
    ],
)
def test_refused(tmp_path: Path, section: Any, said: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": section}))
    with pytest.raises(UserError) as caught:
        load(path)
    assert f"engine.config {path}: zero_optimization" in str(caught.value) and said in str(caught.value)


def test_taken(tmp_path: Path) -> None:
    for path in (Path(__file__).parents[2] / "ds_configs").glob("*.json"):
        load(path)
    path = tmp_path / "zero.json"
    section = {"reduce_bucket_size": 5e8, "sub_group_size": 1000, "offload_param": None, "overlap_comm": False}
    path.write_text(json.dumps({"zero_optimization": section}))
    load(path)
