"""Training and evaluation rows: borders, labels, packing, and who gets what."""

from pathlib import Path

import pytest
import torch
from test_data_tools import (
    TOKENIZERS,
    bpe,
    data_section,
    llama_sentencepiece,
    offline,
    samples_of,
    train_section,
    write_jsonl,
    write_pairs,
)
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from nslora_dist.batches import Batch, pack
from nslora_dist.data import TrainingData, evaluation_batches
from nslora_dist.errors import UserError
from nslora_dist.recipe_data import PromptSet

__all__ = ["offline"]  # a fixture for every test here


def all_batches(data: TrainingData, step: int, world_size: int) -> list[Batch]:
    return [b for rank in range(world_size) for b in data.micro_batches(step, rank=rank, world_size=world_size)]


def one_sample(path: str, tokenizer, **settings) -> tuple[list[int], list[int]]:
    data = TrainingData.load(data_section(path, **settings), train_section(), tokenizer)
    (batch,) = [b for b in all_batches(data, 0, 1) if b.supervised_tokens]
    ((ids, labels),) = samples_of(batch)
    return list(ids), list(labels)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["why {prompt} { blue }?", "the river\n", ""])
def test_sample_is_prompt_then_response_then_eos(tmp_path: Path, name: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]()
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": prompt, "response": "seven 12é"}])
    ids, labels = one_sample(path, tokenizer, template="Q {x}: {prompt}\nA:")
    asked = tokenizer(f"Q {{x}}: {prompt}\nA:").input_ids
    answer = tokenizer("seven 12é", add_special_tokens=False).input_ids
    assert asked[0] == tokenizer.bos_token_id
    assert ids == [*asked, *answer, tokenizer.eos_token_id]
    assert labels == [-100] * len(asked) + [*answer, tokenizer.eos_token_id]
    # What the model reads: byte-level BPE joins directly, sentencepiece puts the space it puts before every text.
    space = " " if name == "sentencepiece" else ""
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"Q {{x}}: {prompt}\nA:{space}seven 12é"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_stand_once_and_in_front_only(tmp_path: Path, name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "lamp", "response": "blue"}])
    expected, _ = one_sample(path, tokenizer)
    assert one_sample(path, tokenizer, template=tokenizer.bos_token + "{prompt}")[0].count(tokenizer.bos_token_id) == 1
    kept = tokenizer.backend_tokenizer.post_processor
    pairs = [(t, tokenizer.convert_tokens_to_ids(t)) for t in (tokenizer.bos_token, tokenizer.eos_token)]
    single = f"{tokenizer.bos_token} $A {tokenizer.eos_token}"
    try:
        closing = processors.TemplateProcessing(single=single, special_tokens=pairs)
        tokenizer.backend_tokenizer.post_processor = closing
        assert one_sample(path, tokenizer)[0] == expected
    finally:
        tokenizer.backend_tokenizer.post_processor = kept


def test_empty_prompt_without_bos_leaves_the_first_token_unscored(tmp_path: Path) -> None:
    tokenizer = bpe()
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "", "response": "lamp blue"}])
    kept = tokenizer.backend_tokenizer.post_processor
    try:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        ids, labels = one_sample(path, tokenizer)
    finally:
        tokenizer.backend_tokenizer.post_processor = kept
    assert labels == [-100, *ids[1:]]


def test_truncation_is_counted_and_rows_without_response_are_left_out(tmp_path: Path, caplog) -> None:
    tokenizer = llama_sentencepiece()
    rows = [
        {"prompt": "lamp", "response": "blue"},  # <s> lamp blue </s>
        {"prompt": "lamp", "response": "blue blue blue blue"},  # cut
        {"prompt": "lamp lamp lamp", "response": "blue"},  # nothing of the response fits
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = TrainingData.load(data_section(path, max_length=4), train_section(), tokenizer)
    assert (data.samples, data.truncated, data.without_response) == (2, 2, 1)
    assert "2 of 3 rows are longer than 4 tokens: 1 cut at the end, 1 left out" in caplog.text
    seen = [s for b in all_batches(data, 0, 1) for s in samples_of(b)]
    lamp, blue = tokenizer("lamp blue", add_special_tokens=False).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert sorted(ids for ids, _ in seen) == sorted([(bos, lamp, blue, eos), (bos, lamp, blue, blue)])
    with pytest.raises(UserError, match="no row fits into 2 tokens with a response; raise max_length"):
        TrainingData.load(data_section(path, max_length=2), train_section(), tokenizer)


def test_an_empty_response_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}])
    with pytest.raises(UserError, match=r"data\.path .*a\.jsonl: line 2 .*field 'response' is empty"):
        TrainingData.load(data_section(path), train_section(), bpe())


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro", [1, 2])
def test_every_world_size_sees_the_same_global_batches(tmp_path: Path, packing: bool, micro: int) -> None:
    path = write_pairs(tmp_path / "a.jsonl", 45)
    train = train_section(micro_batch_size=micro, epochs=2.0)
    data = TrainingData.load(data_section(path, packing=packing, max_length=64), train, bpe())
    assert data.total_steps == 2 * data.steps_per_epoch
    epochs = []
    for epoch in range(2):
        seen = []
        for step in range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch):
            alone = sorted(s for b in all_batches(data, step, 1) for s in samples_of(b))
            assert alone
            for world_size in (2, 4):
                shared = [data.micro_batches(step, rank=r, world_size=world_size) for r in range(world_size)]
                assert {len(batches) for batches in shared} == {train.accumulation(world_size)}
                assert all(len(b.input_ids) <= micro for batches in shared for b in batches)
                assert sorted(s for batches in shared for b in batches for s in samples_of(b)) == alone
            seen.append(alone)
        assert len({s for step in seen for s in step}) == sum(map(len, seen)) == data.samples == 45
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_steps_are_pure_and_seeded(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl", 30)

    def batches(seed: int, steps: list[int]) -> dict[int, list]:
        data = TrainingData.load(data_section(path), train_section(seed=seed), bpe())
        return {step: [b.input_ids.tolist() for b in data.micro_batches(step, rank=1, world_size=2)] for step in steps}

    assert batches(-3, [5, 2]) == {step: b for step, b in batches(-3, [0, 1, 2, 3, 4, 5]).items() if step in (2, 5)}
    assert batches(0, [0]) != batches(1, [0])


def test_another_training_sees_the_same_rows_without_reading_them(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl", 30)
    first, second = train_section(), train_section(seed=5, global_batch_size=4)
    data = TrainingData.load(data_section(path), first, bpe())
    read = TrainingData.load(data_section(path), second, bpe())
    Path(path).unlink()
    again = data.dealt_by(second)
    assert (again.hash, again.total_steps) == (read.hash, read.total_steps) != (data.hash, data.total_steps)
    for step in (0, again.steps_per_epoch, 1):  # to another epoch and back
        seen, wanted = ([s for b in all_batches(x, step, 1) for s in samples_of(b)] for x in (again, read))
        assert seen == wanted


def test_ranks_with_nothing_left_get_rows_without_labels(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl", 9)
    for packing in (False, True):
        data = TrainingData.load(data_section(path, packing=packing, max_length=40), train_section(), bpe())
        last = data.steps_per_epoch - 1
        fillers = [b for b in all_batches(data, last, 8) if not samples_of(b)]
        left = (data.packs or data.samples) - 8 * last
        assert len(fillers) == 8 - left > 0
        for batch in fillers:
            assert batch.supervised_tokens == batch.supervised_rows == batch.token_count == 0
            assert batch.attention_mask is None and (batch.position_ids is not None) == packing


def test_steps_and_hash(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl", 20)

    def load(**train) -> TrainingData:
        return TrainingData.load(data_section(path), train_section(**train), bpe())

    assert (load().steps_per_epoch, load().total_steps) == (3, 3)
    assert load(epochs=0.5).total_steps == 2
    assert load(epochs=0.01).total_steps == 1
    assert load(epochs=None, max_steps=7).total_steps == 7
    with pytest.raises(UserError, match="use train.global_batch_size=9"):
        load().micro_batches(0, rank=0, world_size=3)
    first = load().hash
    assert first == load(seed=5).hash
    write_pairs(tmp_path / "b.jsonl", 20, seed=1)
    path = str(tmp_path / "b.jsonl")
    assert first != load().hash


def test_batch_counts_and_padding(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl", 16)
    for packing in (False, True):
        train = train_section(micro_batch_size=4)
        data = TrainingData.load(data_section(path, packing=packing, max_length=50), train, bpe())
        batches = [b for step in range(data.steps_per_epoch) for b in all_batches(data, step, 1)]
        assert sum(b.token_count for b in batches) == data.tokens
        scored = sum(label != -100 for b in batches for _, labels in samples_of(b) for label in labels)
        assert sum(b.supervised_tokens for b in batches) == scored
        batch = batches[0].to("cpu")
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
        assert batch.input_ids.shape == batch.labels.shape
        if not packing:
            assert batch.position_ids is None and batch.supervised_rows == 4
            assert batch.attention_mask is not None and bool((batch.attention_mask.diff(dim=1) <= 0).all())


def test_pack_fills_rows_in_order() -> None:
    lengths = torch.tensor([6, 5, 4, 3, 2, 10]).numpy()
    assert pack(lengths, range(6), max_length=10) == [[0, 2], [1, 3, 4], [5]]
    assert pack(lengths, [5, 4, 3, 2, 1, 0], max_length=10) == [[5], [4, 3, 2], [1], [0]]
    assert pack(lengths, [0, 1, 2], max_length=10, window=1) == [[0], [1, 2]]


def tiny(family: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    if family == "mistral":
        model = MistralForCausalLM._from_config(MistralConfig(**shape, sliding_window=8), attn_implementation=attention)
    else:
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), attn_implementation=attention)
    return model.eval()


@pytest.mark.parametrize(
    ("family", "attention", "micro"),
    [("llama", "sdpa", 1), ("llama", "sdpa", 4), ("llama", "eager", 4), ("mistral", "sdpa", 4)],
)
@torch.no_grad()
def test_packed_samples_do_not_see_each_other(tmp_path: Path, family: str, attention: str, micro: int) -> None:
    path = write_pairs(tmp_path / "a.jsonl", 16)
    train = train_section(micro_batch_size=micro, global_batch_size=4)
    data = TrainingData.load(data_section(path, packing=True, max_length=64), train, bpe())
    assert data.packs is not None and data.packs < data.samples
    model = tiny(family, attention)
    compared = padded = 0
    for batch in all_batches(data, 0, 1):
        if not batch.supervised_tokens:
            continue
        assert batch.attention_mask is None and batch.input_ids.shape[1] <= 64
        padded += batch.unmasked_padding
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        assert bool(logits.isfinite().all())
        for row, positions in enumerate(batch.position_ids):
            starts = torch.nonzero(positions == 0).flatten().tolist()
            assert (batch.labels[row, starts] == -100).all()
            for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
                assert positions[start:end].tolist() == list(range(end - start))
                alone = model(input_ids=batch.input_ids[row : row + 1, start:end], use_cache=False).logits[0]
                torch.testing.assert_close(logits[row, start:end], alone, rtol=1e-5, atol=1e-6)
                compared += 1
    assert compared > 8 and (padded > 0) == (micro > 1)


def test_evaluation_rows_are_dealt_without_overlap_or_loss(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl", 21)
    section = PromptSet(path=path)

    def dealt(world_size: int, **more) -> list[list[Batch]]:
        return [
            evaluation_batches(section, bpe(), batch_size=4, rank=r, world_size=world_size, **more)
            for r in range(world_size)
        ]

    everything = sorted(s for batches in dealt(1) for b in batches for s in samples_of(b))
    assert len(set(everything)) == 21
    for world_size in (2, 3, 8, 32):
        ranks = dealt(world_size)
        assert len({len(batches) for batches in ranks}) == 1
        assert sorted(s for batches in ranks for b in batches for s in samples_of(b)) == everything
        assert sum(b.supervised_rows for batches in ranks for b in batches) == 21
        assert all(len(b.input_ids) <= 4 for batches in ranks for b in batches)


def test_evaluation_samples_are_the_first_and_long_ones_are_left_out(tmp_path: Path, caplog) -> None:
    rows = [{"prompt": "lamp", "response": word} for word in ("blue", "green", "river", "blue blue blue blue")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    tokenizer = llama_sentencepiece()

    def asked(**settings) -> int:
        limits = {"max_length": settings.pop("max_length", None)}
        section = PromptSet(path=path, **settings)
        batches = evaluation_batches(section, tokenizer, batch_size=2, rank=0, world_size=1, **limits)
        return sum(b.supervised_rows for b in batches)

    assert (asked(), asked(samples=2), asked(samples=9), asked(max_length=5)) == (4, 2, 4, 3)
    assert "9 rows asked for (samples), 4 there" in caplog.text
    assert "1 of 4 rows are longer than 5 tokens: 0 cut at the end, 1 left out" in caplog.text
    with pytest.raises(UserError, match="no row fits into 3 tokens"):
        asked(max_length=3)
