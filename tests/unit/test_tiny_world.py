"""The demo's world is reproducible, its tokenizer is exact, and the shipped base knows what it should."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nslora_dist import pretrain, tiny_world

SHIPPED = Path(__file__).resolve().parents[2] / "recipes" / "tiny"


@pytest.fixture(scope="module")
def world() -> tiny_world.World:
    return tiny_world.make_world(0)


@pytest.fixture(scope="module")
def tokenizer(world):
    return tiny_world.make_tokenizer(world)


@pytest.fixture(scope="module")
def shipped_base():
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / "base", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(SHIPPED / "base")


def test_a_seed_decides_everything(world):
    assert tiny_world.make_world(0) == world
    assert tiny_world.make_world(1).facts != world.facts


def test_task_rows_to_train_and_test_are_disjoint_and_correct(world):
    train = {row["prompt"] for row in world.task_train}
    assert len(train) == len(world.task_train)
    assert train.isdisjoint(row["prompt"] for row in world.task_test)
    for row in world.task_train[:200]:
        digits = [word for word in row["prompt"].split() if word.isdigit()]
        assert int("".join(digits[:2])) - int("".join(digits[2:])) == int(row["response"].replace(" ", "")[::-1])


@pytest.mark.parametrize("skill", ["sum", "maximum"])
def test_a_skill_is_tested_on_pairs_it_was_not_shown(world, skill):
    shown = {row["prompt"] for row in world.pretraining[skill]}
    assert shown.isdisjoint(row["prompt"] for row in world.retention[skill])


def test_every_fact_is_shown_and_asked(world):
    assert 400 <= len(world.facts) <= 800
    shown = {tiny_world.text_of(row) for row in world.pretraining["facts"]}
    assert len(shown) == 3 * len(world.facts)
    assert shown.issuperset(tiny_world.text_of(row) for row in world.retention["facts"])


def test_calibration_leaves_half_of_the_people_out(world):
    named = {tuple(word for word in text.split() if word[0].isupper())[:2] for text in world.calibration["facts"]}
    unseen = {tuple(word for word in text.split() if word[0].isupper())[:2] for text in world.probes["facts_unseen"]}
    assert named and unseen and named.isdisjoint(unseen)


def test_the_task_brings_only_its_own_words(world):
    known = {word for rows in world.pretraining.values() for row in rows for word in tiny_world.text_of(row).split()}
    task = {word for row in world.task_train for word in tiny_world.text_of(row).split()}
    assert task - known == {"difference", "between", ",", "equals"}
    assert task <= set(world.vocabulary)


def test_tokenizer_round_trip_after_saving(world, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    kinds = (*world.pretraining.values(), world.task_train)
    for text in (tiny_world.text_of(row) for rows in kinds for row in rows[:50]):
        ids = loaded(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"]
        assert ids[0] == loaded.bos_token_id and loaded.unk_token_id not in ids
        assert loaded.decode(ids, skip_special_tokens=True) == text
    assert loaded("sum of 4 7 and nowhere")["input_ids"][-1] == loaded.unk_token_id
    assert len({loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id}) == 4


def test_prompt_and_response_tokenise_apart(world, tokenizer):
    for row in (*world.task_train[:50], *world.retention["facts"][:50], *world.retention["sum"][:50]):
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        assert prompt + response == tokenizer(tiny_world.text_of(row))["input_ids"]
        ids, is_response = pretrain.encode([row], tokenizer)
        assert ids[0].tolist() == [*prompt, *response, tokenizer.eos_token_id]
        assert ids[0, is_response[0]].tolist() == [*response, tokenizer.eos_token_id]


@pytest.mark.parametrize("too_many", [{"people": 577}, {"task_train_rows": 4000}, {"calibration_rows": 5000}])
def test_asking_for_more_than_the_world_holds_names_the_argument(too_many):
    with pytest.raises(ValueError, match=next(iter(too_many))):
        tiny_world.make_world(0, **too_many)


def test_pretraining_is_deterministic_and_learns(world):
    # A width and a share of rows small enough for a second; the loss must fall and a second run must repeat it.
    small = tiny_world.make_world(0, people=4, calibration_rows=4, probe_rows=2)
    tokenizer = tiny_world.make_tokenizer(small)
    settings = pretrain.PretrainSettings(steps=12, batch_rows=20, learning_rate=5e-3)
    runs = []
    for _ in range(2):
        model = pretrain.build_model(tokenizer, hidden_size=64, intermediate_size=64, layers=1, heads=2, kv_heads=1)
        runs.append(pretrain.pretrain(model, tokenizer, small.pretraining, settings))
    assert runs[0] == runs[1]
    assert runs[0][-1] < 0.8 * runs[0][0]


def test_pretraining_goes_on_from_its_state_to_the_same_bits(tmp_path, monkeypatch):
    small = tiny_world.make_world(0, people=4, calibration_rows=4, probe_rows=2)
    tokenizer = tiny_world.make_tokenizer(small)
    settings = pretrain.PretrainSettings(steps=12, batch_rows=20, learning_rate=5e-3)

    def run(**given):
        model = pretrain.build_model(tokenizer, hidden_size=64, intermediate_size=64, layers=1, heads=2, kv_heads=1)
        return model, pretrain.pretrain(model, tokenizer, small.pretraining, settings, **given)

    whole, losses = run()
    state, done = tmp_path / "state", []
    weighted = pretrain._weighted_loss

    def killed(*given):
        done.append(1)
        if len(done) > 7 * len(settings.mixture):
            raise KeyboardInterrupt
        return weighted(*given)

    monkeypatch.setattr(pretrain, "STATE_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "_weighted_loss", killed)
        run(state=state)
    monkeypatch.setattr(pretrain, "_weighted_loss", lambda *given: done.append(1) or weighted(*given))
    done.clear()
    resumed, again = run(state=state)
    assert len(done) == 5 * len(settings.mixture), "it began anew"
    assert again == losses
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_kinds_joined_to_one_batch_have_the_loss_that_they_have_apart(world, tokenizer):
    """As a GPU takes them. Sums of some hundred float32 losses in another order: 1e-5."""
    model = pretrain.build_model(tokenizer, hidden_size=64, intermediate_size=64, layers=1, heads=2, kv_heads=1)
    parts = [pretrain.encode(rows[:20], tokenizer) for rows in world.pretraining.values()]
    assert len({ids.shape[1] for ids, _ in parts}) > 1
    settings = pretrain.PretrainSettings()
    with torch.no_grad():
        apart = [pretrain._weighted_loss(model, *part, tokenizer.pad_token_id, settings) for part in parts]
        loss, weight = pretrain._weighted_loss(
            model, *pretrain._joined(parts, tokenizer.pad_token_id), tokenizer.pad_token_id, settings
        )
    assert float(loss) == pytest.approx(sum(float(own) for own, _ in apart), rel=1e-5)
    assert weight == pytest.approx(sum(own for _, own in apart), rel=1e-6)


def test_one_forward_pass_decides_as_greedy_generation_does(shipped_base, world):
    model, tokenizer = shipped_base
    # The untrained task gives wrong answers and the facts right ones, so both outcomes are compared.
    for row in (*world.task_test[:6], *world.retention["facts"][:6], *world.retention["sum"][:4]):
        prompt = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
        expected = pretrain.encode([row], tokenizer)[0][0].tolist()
        assert pretrain.greedy_exact_match(model, tokenizer, [row]) == (written[0].tolist() == expected)


def test_shipped_data_is_what_the_generator_makes(world):
    files = tiny_world.data_files(world)
    assert {path.name for path in (SHIPPED / "data").iterdir()} == set(files)
    for name, rows in files.items():
        assert (SHIPPED / "data" / name).read_text(encoding="utf-8") == tiny_world.to_jsonl(rows), name


def test_shipped_base_fits_the_world_and_recalls_it(shipped_base, world, tokenizer):
    model, shipped_tokenizer = shipped_base
    assert shipped_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.hidden_size % 64 == 0 and model.config.intermediate_size % 64 == 0
    facts = random.Random(0).sample(world.retention["facts"], 200)
    assert pretrain.greedy_exact_match(model, shipped_tokenizer, facts) > 0.95
    for skill in tiny_world.SKILLS:
        assert pretrain.greedy_exact_match(model, shipped_tokenizer, world.retention[skill][:64]) > 0.9
