"""What the data tests share: local files, sections of a recipe, and two tokenizers trained on the spot."""

import json
import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import datasets
import huggingface_hub
import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nslora_dist.batches import Batch
from nslora_dist.recipe import BaseModelSection, TrainSection
from nslora_dist.recipe_data import DataSection
from nslora_dist.rows import load_tokenizer

datasets.disable_progress_bars()
torch.set_num_threads(1)  # matrices this small are only slowed down by threads

WORDS = ["the", "of", "river", "stone", "walks", "lamp", "green", "seven", "birds", "answer", "question", "why", "blue"]
WORDS += ["mountain", "runs", "{", "}", "1", "2", "3"]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and a cache of the test's own. What HF_HUB_OFFLINE=1 sets, for modules that are imported already."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_pairs(path: Path, count: int, *, seed: int = 0, longest: int = 12) -> str:
    """Rows of different lengths, each with its number in it, so that no two are the same."""
    rng = random.Random(seed)
    rows = [
        {"prompt": f"{i} {sentence(rng, rng.randint(1, longest))}", "response": sentence(rng, rng.randint(1, longest))}
        for i in range(count)
    ]
    return write_jsonl(path, rows)


def data_section(path: str, **settings: object) -> DataSection:
    return DataSection.model_validate({"path": path, **settings})


def train_section(**settings: object) -> TrainSection:
    settings = {"learning_rate": 1e-3, "epochs": 1.0, "global_batch_size": 8, **settings}
    return TrainSection.model_validate(settings)


@cache
def bpe() -> PreTrainedTokenizerBase:
    """Byte-level BPE as LLaMA 3 has it: a BOS in front, no padding token."""
    rng = random.Random(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence(rng, 8) for _ in range(200)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    folder = mkdtemp()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    return load_tokenizer(BaseModelSection(path=folder))


@cache
def llama_sentencepiece() -> PreTrainedTokenizerBase:
    """A sentencepiece model as LLaMA 2 has it: byte fallback, a space put in front of every text, no tokenizer.json."""
    rng = random.Random(2)
    folder = Path(mkdtemp())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence(rng, 8) for _ in range(300)]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=380,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    # As published LLaMA 2 folders have it; without add_bos_token, transformers 5 puts no BOS in front.
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(BaseModelSection(path=str(folder)))


TOKENIZERS = {"bpe": bpe, "sentencepiece": llama_sentencepiece}


def samples_of(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each real sample's tokens and labels, whether the batch is padded or packed."""
    found = []
    for row in range(len(batch.input_ids)):
        ids, labels = batch.input_ids[row], batch.labels[row]
        if batch.attention_mask is not None:
            keep = batch.attention_mask[row].bool()
            ids, labels = ids[keep], labels[keep]
        starts = [0]
        if batch.position_ids is not None:
            starts = torch.nonzero(batch.position_ids[row] == 0).flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if bool((labels[start:end] != -100).any()):  # else it is padding
                found.append((tuple(ids[start:end].tolist()), tuple(labels[start:end].tolist())))
    return found
