"""Two processes: rank 0 reads, both hold the same rows, and both are told what is wrong."""

from pathlib import Path

import datasets
import pytest
import torch.distributed
import torch.multiprocessing
from test_data_tools import bpe, data_section, samples_of, train_section, write_jsonl, write_pairs

from nslora_dist.data import TrainingData
from nslora_dist.errors import UserError


def _rank(rank: int, folder: str, bad: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
    tokenizer = bpe()
    # The other rank's file is missing: it must not be looked for.
    path = f"{folder}/a.jsonl" if rank == 0 else f"{folder}/none.jsonl"
    data = TrainingData.load(data_section(path), train_section(), tokenizer)
    mine = [s for b in data.micro_batches(0, rank=rank, world_size=2) for s in samples_of(b)]
    told: list[object] = [None, None]
    with pytest.raises(UserError, match="line 2 .*field 'response' is int 3, not text") as caught:
        TrainingData.load(data_section(bad), train_section(), tokenizer)
    torch.distributed.all_gather_object(told, (data.hash, str(caught.value)))
    assert told[0] == told[1]
    shares: list[list] = [[], []]
    torch.distributed.all_gather_object(shares, mine)
    assert len(shares[0]) == len(shares[1]) == 4 and not set(shares[0]) & set(shares[1])
    torch.distributed.destroy_process_group()


def test_rank_0_reads_for_all(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a.jsonl", 20)
    bad = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": 3}])
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path), bad), nprocs=2)
