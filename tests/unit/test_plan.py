"""The plan's formulas by hand, its verdicts, and what the command prints and writes."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from helpers import world
from nslora_dist.errors import UserError
from nslora_dist.frozen import FrozenLinear
from nslora_dist.plan import memory, traffic, zero3
from nslora_dist.plan.advice import advise, changed, largest_micro_batch, remedies
from nslora_dist.plan.calibrating import largest_ownership, owned_groups, sequences
from nslora_dist.plan.check import check
from nslora_dist.plan.cluster import Cluster, quantity
from nslora_dist.plan.evaluating import evaluation_pass
from nslora_dist.plan.main import main
from nslora_dist.plan.phase import wire_seconds
from nslora_dist.plan.phases import make_plan
from nslora_dist.plan.shapes import Shapes, shapes_of
from nslora_dist.plan.sweep import sweep, write_csv, write_plot
from nslora_dist.plan.text import describe
from nslora_dist.plan.traffic import Traffic
from nslora_dist.plan.training import train_flops
from nslora_dist.recipe import Recipe
from nslora_dist.recipe_data import PromptSet
from nslora_dist.recipe_file import load_recipe

GPU = Cluster(gpus=8, gpu_memory=80e9, interconnect=50e9)


@pytest.fixture(scope="module")
def large() -> tuple[Recipe, Shapes]:
    recipe = load_recipe("llama3_70b_math")
    return recipe, shapes_of(recipe)


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Recipe, Shapes]:
    world.make_texts(tmp_path)
    recipe = world.make_recipe(tmp_path, world.make_base(tmp_path / "base"), tmp_path / "out")
    return recipe, shapes_of(recipe)


def test_a_pass_of_evaluation(large: tuple[Recipe, Shapes]) -> None:
    """At 70B a token takes the time in which every weight arrives, on one GPU that in which it is read."""
    recipe, shapes = large
    token = evaluation_pass(recipe, shapes, GPU, zero3.Knobs(), rows=16, length=1)
    assert token.sent == pytest.approx(2 * 70.55e9 * 7 / 8, rel=0.05)
    assert token.seconds == pytest.approx(token.sent / (0.8 * 50e9), rel=0.05)
    assert token.cache == 16 * 2 * 2 * 80 * 8 * 128
    small = load_recipe("llama3_8b_math", ["engine.name=single"])
    own = evaluation_pass(small, shapes_of(small), replace(GPU, gpus=1), zero3.Knobs(), rows=1, length=1)
    weights = 32 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336) + 128256 * 4096
    assert own.sent == 0 and own.seconds == pytest.approx(2 * weights / GPU.memory_bandwidth, rel=1e-6)
    long = evaluation_pass(small, shapes_of(small), replace(GPU, gpus=1), zero3.Knobs(), rows=8, length=2048)
    assert long.seconds > 2 * 8 * 2048 * weights / (GPU.flops * GPU.efficiency)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_weights_are_gathered_once_for_an_evaluation_where_there_is_room(engine: str) -> None:
    recipe = load_recipe("llama3_8b_math", [f"engine.name={engine}"])
    shapes = shapes_of(recipe)
    size = 2 * sum(p.numel for p in shapes.params)
    roomy = evaluation_pass(recipe, shapes, GPU, zero3.Knobs(), rows=32, length=1)
    assert roomy.kept == size and roomy.sent == 0
    assert roomy.seconds < 0.02
    tight = evaluation_pass(recipe, shapes, replace(GPU, gpu_memory=28e9), zero3.Knobs(), rows=32, length=1)
    assert tight.kept == 0 and tight.sent == pytest.approx(size * 7 / 8, rel=0.01)
    assert tight.seconds > 10 * roomy.seconds
    assert "of weights stay gathered" in describe(make_plan(recipe, shapes, GPU))


def test_evaluation_is_in_the_text_where_the_recipe_asks_for_it(large: tuple[Recipe, Shapes]) -> None:
    recipe, shapes = large
    text = describe(make_plan(recipe, shapes, GPU))
    assert "evaluation.lm_eval: 3." in text and "s for each token that is written, in 128 answers at once" in text
    assert "\nevaluation: " not in text
    tree = {"prompt_field": "p", "response_field": "r", "path": "questions"}
    asked = recipe.evaluation.model_copy(update={"lm_eval": None, "adaptation": PromptSet.model_validate(tree)})
    text = describe(make_plan(recipe.model_copy(update={"evaluation": asked}), shapes, GPU))
    assert "\nevaluation: " in text and "for 64 questions of 512 tokens, 8 a rank" in text
    assert "evaluation.lm_eval" not in text


def test_grams_of_a_70b_block(large: tuple[Recipe, Shapes]) -> None:
    _, shapes = large
    assert [group.width for group in shapes.groups] == [8192, 8192, 8192, 28672]
    block = sum(4 * group.width**2 for group in shapes.groups)
    assert round(block / 1e9, 1) == 4.1  # docs/methods.md §6
    assert round(80 * block / 1e9) in (327, 328)


def test_sizes_of_70b(large: tuple[Recipe, Shapes]) -> None:
    _, shapes = large
    assert sum(unit.base_bytes for unit in shapes.units) == 2 * 70_553_706_496
    assert shapes.checkpoint == 2 * 70_553_706_496
    assert len({p.name for p in shapes.params}) == len(shapes.params)
    packed = shapes_of(load_recipe("llama3_70b_math_qlora"))
    assert packed.checkpoint == shapes.checkpoint
    assert packed.block_products == shapes.block_products


def test_four_bit_scales_are_what_bitsandbytes_keeps(toy: tuple[Recipe, Shapes]) -> None:
    recipe, _ = toy
    base = recipe.base_model.model_copy(update={"quantization": "nf4"})
    shapes = shapes_of(recipe.model_copy(update={"base_model": base}))
    held = 0
    for linear in shapes.linears:
        with torch.device("meta"):
            module = FrozenLinear(nn.Linear(linear.d_in, linear.d_out), quantized=True, dtype=torch.float32)
        module.fill(module.pack(torch.randn(linear.d_out, linear.d_in)), None)
        state = module.quant_state
        tensors = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        held += sum(t.numel() * t.element_size() for t in tensors)
        packed = next(p for p in shapes.block.params if p.name.endswith(f"{linear.name}.base.weight"))
        assert packed.bytes == module.weight.numel() * module.weight.element_size()
    assert shapes.quant_state == held


@pytest.mark.parametrize(
    ("collective", "sent"),
    [("all_gather", 75), ("reduce_scatter", 75), ("all_reduce", 150), ("reduce", 100), ("broadcast", 100)],
)
def test_rings(collective: str, sent: float) -> None:
    assert Traffic(collective, 1, 100).sent(4) == sent
    assert Traffic(collective, 1, 100).sent(1) == 0


def test_calibration_traffic_by_hand(toy: tuple[Recipe, Shapes]) -> None:
    recipe, shapes = toy
    found = {t.collective: t for t in traffic.calibration(shapes, traffic.Texts.of(recipe), 2)}
    # Two blocks, two sources; groups of 64, 64, 64, 128.
    assert found["reduce"] == Traffic("reduce", 2 * 2 * 4, 2 * 2 * 4 * (3 * 64 * 65 // 2 + 128 * 129 // 2))
    # Two sources, their held-out texts and one probe: a scalar and one a module, float64; then r x r, and a float32.
    scalars = 2 * 5 * (4 + 2 + 3 + 2) * 8 + 2 * 4 * (8 * 8 * 4 + 2 * 4)
    assert found["all_reduce"].bytes == scalars
    assert traffic.calibration(shapes, traffic.Texts.of(recipe), 1) == []


def test_fsdp2_pads_rows(toy: tuple[Recipe, Shapes]) -> None:
    _, shapes = toy
    vocabulary = next(u for u in shapes.units if u.name == "model.embed_tokens")
    assert traffic.fsdp2_gather(vocabulary, shapes, 8) == 72 * 64 * 4  # 67 rows
    gathers, again, reduces = traffic.fsdp2_micro_batch(shapes, 2)
    # root, embedding, two blocks and head; the blocks again for backward
    assert (gathers.calls, again.calls, reduces.calls) == (5, 2, 2)
    assert reduces.bytes == 2 * 4 * sum(p.numel for p in shapes.block.params if p.trained)


def test_zero3_gathers_between_once_and_twice(toy: tuple[Recipe, Shapes]) -> None:
    _, shapes = toy
    every = sum(p.bytes for p in shapes.params)
    kept = zero3.steady(shapes, zero3.Knobs(persistence=0), checkpointing=False)
    assert kept.traffic("first", 1) == []
    assert sum(t.bytes for t in kept.traffic("first", 2)) == every + 0
    assert kept.live == every
    never = zero3.Knobs(persistence=0, prefetch=0, max_reuse=0)
    twice = zero3.steady(shapes, never, checkpointing=False)
    embedding = shapes.units[0].bytes
    norm = next(p for p in shapes.params if p.name.endswith("layers.0.input_layernorm.weight")).bytes
    assert sum(t.bytes for t in twice.traffic("later", 2)) == 2 * every - embedding - norm
    assert twice.live < every / 2
    resident = zero3.steady(shapes, zero3.Knobs(persistence=10**6), checkpointing=False)
    assert resident.first == ()
    assert len(resident.after_step) == len(shapes.params)


def test_zero3_checkpointing_gathers_frozen_weights_nearly_thrice(large: tuple[Recipe, Shapes]) -> None:
    _, shapes = large
    base = sum(unit.base_bytes for unit in shapes.units)
    for checkpointing, least, most in ((False, 1.9, 2.0), (True, 2.5, 3.0)):
        found = zero3.steady(shapes, zero3.Knobs(bucket=50_000_000), checkpointing=checkpointing)
        gathered = sum(p.bytes for call in found.later for p in call if not p.trained and "lora" not in p.name)
        assert least < gathered / base < most
        assert found.live < 5e9


def test_state_shrinks_with_ranks_but_scales_do_not() -> None:
    recipe = load_recipe("llama3_70b_math_qlora")
    shapes = shapes_of(recipe)
    few, many = (memory.state(shapes, n, "fsdp2", zero3.Knobs())[0] for n in (8, 64))
    assert few["4-bit scales"] == many["4-bit scales"] > 1e9
    assert few["frozen weights"] == pytest.approx(8 * many["frozen weights"], rel=0.01)


def test_offloaded_state_is_in_host_memory(large: tuple[Recipe, Shapes]) -> None:
    _, shapes = large
    knobs = zero3.Knobs(offload_param=True, offload_optimizer=True)
    device, host = memory.state(shapes, 8, "zero3", knobs)
    assert device == {}
    assert sum(host.values()) == sum(memory.state(shapes, 8, "zero3", zero3.Knobs())[0].values())


def test_flops_of_a_token(large: tuple[Recipe, Shapes]) -> None:
    _, shapes = large
    batch = memory.Batch(1, 512, supervised=1.0)
    products = 512 * (80 * shapes.block_products + shapes.vocabulary * shapes.hidden)
    assert train_flops(shapes, batch, checkpointing=False) == pytest.approx(4 * products, rel=0.1)
    assert train_flops(shapes, batch, checkpointing=True) == pytest.approx(6 * products, rel=0.1)


def test_checkpointing_saves_memory_and_rows_cost_it(large: tuple[Recipe, Shapes]) -> None:
    _, shapes = large

    def kept(rows: int, checkpointing: bool) -> float:
        batch = memory.Batch(rows, 512)
        return sum(memory.saved(shapes, batch, attention="sdpa", checkpointing=checkpointing, engine="fsdp2").values())

    assert kept(1, True) < kept(1, False) / 8
    assert kept(2, False) == pytest.approx(2 * kept(1, False), rel=0.01)


def test_ownership_follows_the_dealing(large: tuple[Recipe, Shapes]) -> None:
    _, shapes = large
    assert largest_ownership(shapes, 8, "rank0") == shapes.groups
    # The rank with the least to do takes a block's narrow groups and, still having the least, its wide one.
    assert 28672 in {g.width for g in largest_ownership(shapes, 8, "spread")}
    loads = owned_groups(shapes, 8, "spread")
    assert max(loads) < 1.2 * sum(loads) / 8


@pytest.mark.parametrize(
    ("text", "value"),
    [("80GB", 80e9), ("24GiB", 24 * 2**30), ("400Gb/s", 50e9), ("900GB/s", 9e11), ("989T", 989e12), ("0.4", 0.4)],
)
def test_quantities(text: str, value: float) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize("text", ["", "GB", "80XB", "eighty", "1..2GB", "-3GB"])
def test_no_quantities(text: str) -> None:
    with pytest.raises(UserError, match="is no quantity"):
        quantity(text)


def test_slower_link_between_nodes() -> None:
    wire = [Traffic("all_gather", 1, 1e12)]
    inside = replace(GPU, intra_node=450e9)
    assert wire_seconds(wire, inside) < wire_seconds(wire, GPU)
    assert wire_seconds(wire, replace(inside, gpus=16)) > 5 * wire_seconds(wire, inside)
    assert wire_seconds(wire, replace(GPU, gpus=1)) == 0


def test_70b_fits_eight_large_gpus_and_not_two(large: tuple[Recipe, Shapes]) -> None:
    recipe, shapes = large
    fits = make_plan(recipe, shapes, GPU)
    assert fits.short_of() == []
    assert "Every phase fits." in describe(fits)
    rows = largest_micro_batch(recipe, shapes, GPU)
    assert rows >= 8 and recipe.train.global_batch_size % (8 * rows) == 0
    short = make_plan(recipe, shapes, replace(GPU, gpus=2))
    text = describe(short)
    assert text.index("TOO LITTLE: train: GPU memory") < text.index("phase  ")  # said first
    assert "base_model.quantization=nf4: fits" in text


def test_remedies_come_in_order(toy: tuple[Recipe, Shapes]) -> None:
    recipe, shapes = toy
    sharded = changed(recipe, engine__name="fsdp2")
    tried = [what.split("=")[0].split()[0] for what, _, _ in remedies(sharded, replace(GPU, gpus=2))]
    assert tried == [
        "train.activation_checkpointing",
        "train.micro_batch_size",
        "calibration.batch_size",
        "calibration.hidden_states",
        "calibration.solver.placement",
        "base_model.quantization",
        "--gpus",
        "--gpus",
        "engine.name",
    ]
    hopeless = make_plan(sharded, shapes, replace(GPU, gpus=2, gpu_memory=1e5, context=0.0))
    assert "nothing tried fits" in advise(hopeless)[-1]


def test_one_small_gpu_calibrates_70b_in_four_bits() -> None:
    recipe = load_recipe("llama3_70b_math_qlora")
    plan = make_plan(recipe, shapes_of(recipe), Cluster(gpus=1, gpu_memory=24e9))
    assert [phase.name for phase, _ in plan.short_of()] == ["load", "train", "measure", "export"]


def test_disk_and_host_memory_are_compared(large: tuple[Recipe, Shapes]) -> None:
    recipe, shapes = large
    short = make_plan(recipe, shapes, replace(GPU, disk=1e9, host_memory=10e9)).short_of()
    said = " ".join(line for _, line in short)
    assert "calibrate: disk in output_dir" in said and "load: host memory of a node" in said


def test_check_names_the_figure(toy: tuple[Recipe, Shapes], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, shapes = toy
    cpu = torch.device("cpu")
    for phase in ("load", "calibrate", "train", "measure", "export"):
        check(recipe, phase, world_size=1, device=cpu, shapes=shapes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        UserError, match=r"^calibrate: needs .* of disk in output_dir .*, 1 kB are free; make room"
    ) as error:
        check(recipe, "calibrate", world_size=1, device=cpu, shapes=shapes)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    monkeypatch.setattr("nslora_dist.machine.host_memory", lambda: (1e5, 0.0))
    with pytest.raises(UserError, match=r"^train: needs about .* of host memory, 100 kB are free"):
        check(recipe, "train", world_size=1, device=cpu, shapes=shapes)


def test_a_check_asks_for_a_batch_that_divides_only_where_it_is_trained_with(toy: tuple[Recipe, Shapes]) -> None:
    recipe, shapes = toy
    sharded = changed(recipe, engine__name="fsdp2")
    for phase in ("load", "calibrate"):
        for one in (recipe, sharded):
            check(one, phase, world_size=3, device=torch.device("cpu"), shapes=shapes)
    with pytest.raises(UserError, match="global_batch_size 8 is no multiple"):
        check(sharded, "train", world_size=3, device=torch.device("cpu"), shapes=shapes)
    with pytest.raises(UserError, match="engine.name single runs in one process, not on 3 ranks"):
        check(recipe, "train", world_size=3, device=torch.device("cpu"), shapes=shapes)


def test_sweep_to_csv_and_plot(large: tuple[Recipe, Shapes], tmp_path: Path) -> None:
    recipe, shapes = large
    plans = sweep(recipe, shapes, GPU)
    assert [plan.cluster.gpus for plan in plans] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    # A global batch of 128 does not go round; the next one that does is a micro-batch for every rank.
    assert plans[-1].recipe.train.global_batch_size == 1024 * recipe.train.micro_batch_size
    write_csv(tmp_path / "sweep.csv", plans)
    with (tmp_path / "sweep.csv").open() as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    assert [row["fits"] for row in rows[:2]] == ["False", "False"] and rows[3]["fits"] == "True"
    memory_used = [float(row["train_gpu_bytes"]) for row in rows]
    assert memory_used == sorted(memory_used, reverse=True)
    write_plot(tmp_path / "sweep.png", plans)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--recipe llama3_70b_math --gpus 8 --gpu-memory 80GB --interconnect 400Gb/s train.micro_batch_size=2"
    assert main(line.split()) == 0
    said = capsys.readouterr().out
    phases = ("load", "calibrate", "solve", "train", "measure", "export")
    for part in (*phases, "4.09 GB of Grams a block", "efficiency", "2 x 512"):
        assert part in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpus 3", "is no multiple of micro_batch_size"),
        ("--gpus 0", "--gpus 0: a whole number from 1"),
        ("--gpus 2.5", "--gpus 2.5: a whole number from 1"),
        ("--steps -3", "--steps: '-3' is no quantity"),
        ("--steps 2.5", "--steps 2.5: a whole number from 1"),
        ("--gpus 8 engine.name=single", "engine.name single runs in one process, not on 8 ranks"),
        ("--flops 0", "--flops 0: dense matrix rate of a GPU in the compute dtype, per second; wanted is above 0"),
        ("--efficiency 40", "wanted is above 0, at most 1"),
        ("--overlap 3", "wanted is from 0, at most 1"),
        ("--gpu-memory 1GB", "--gpu-memory 1e+09: nothing is left of it beside --context 1.5e+09"),
        ("--sweep /nowhere/x.csv", "--sweep /nowhere/x.csv: there is no folder /nowhere"),
        ("--plot x.foo", "--plot x.foo: wanted is a name that ends in .png, .pdf, .svg"),
        ("--gpu-memory much", "--gpu-memory: 'much' is no quantity"),
        ("train.nonsense=1", "unknown key"),
    ],
)
def test_command_refuses(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "llama3_70b_math", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_sweep_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "tiny_math", "--gpus", "2", "--sweep", str(tmp_path)]) == 2
    assert f"error: --sweep {tmp_path}: cannot be written" in capsys.readouterr().err


def test_a_micro_batch_that_the_recipe_forbids_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """A baseline's global batch has to divide by it, too; before, the plan ended with pydantic's traceback."""
    assert main(["--recipe", "tiny_math", "evaluation.baselines.lora.train.global_batch_size=16"]) == 0
    said = capsys.readouterr().out
    assert "largest train.micro_batch_size that fits: 16 (" in said


def test_knobs_are_read(tmp_path: Path) -> None:
    settings = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3_offload.json").read_text())
    knobs = zero3.Knobs.of(settings)
    assert knobs.offload_param and knobs.offload_optimizer and knobs.bucket == 50_000_000
    assert zero3.Knobs.of({}) == zero3.Knobs()


def test_null_lora_counts_its_bases_and_composed_factors(tmp_path: Path) -> None:
    """Toy blocks of 64 and 128: V and U of every module, its factors of the whole rank kept, half of them trained."""
    world.make_texts(tmp_path)
    changes = {"adapter": {"method": "null_lora", "rank": 8, "null_dim": 16}}
    recipe = world.make_recipe(tmp_path, world.make_base(tmp_path / "base"), tmp_path / "out", **changes)
    shapes = shapes_of(recipe)
    widths = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))  # d_in + d_out of seven linears, two blocks
    assert sum(p.numel for p in shapes.trained) == 4 * widths
    texts = memory.Texts.of(recipe)
    assert memory.null_space_bytes(shapes, texts) == 4 * 16 * widths
    assert memory.adapter_bytes(shapes) == 4 * 8 * widths
    batch = memory.Batch(2, 16, masked=False, supervised=1.0)
    kept = memory.saved(shapes, batch, attention="sdpa", checkpointing=False, engine="fsdp2")
    assert kept["composed factors"] == 4 * 8 * widths
    assert "composed factors" not in memory.saved(shapes, batch, attention="sdpa", checkpointing=True, engine="fsdp2")
    gathered = sum(one.bytes for one in traffic.export(shapes, 2, "fsdp2"))
    assert gathered == 4 * 4 * widths, "the bases stay where they are"
    said = describe(make_plan(recipe, shapes, replace(GPU, gpus=1)))
    assert "null_lora: counted with null_dim directions a side" in said and "calibrate " not in said


def test_what_is_measured_at_the_end_is_planned(large: tuple[Recipe, Shapes]) -> None:
    """Two passes over all texts; a budget on a random A costs a third, and each step a sum of one number a module."""
    recipe, shapes = large
    plan = make_plan(recipe, shapes, GPU)
    section, measured = recipe.calibration, plan.phase("measure")
    count = sum(sequences(recipe, heldout=False))
    assert count == 224 + 256  # one source, an eighth held out, and one probe
    tokens = count // 8 * section.sequence_length
    products = 80 * shapes.block_products + shapes.vocabulary * shapes.hidden
    assert measured.flops == pytest.approx(2 * 2 * tokens * products, rel=0.05)  # attention and adapters come on top
    dial = {"method": "lora", "freeze_a": True, "interference_budget": 0.1}
    limited = changed(recipe, **{f"adapter__{key}": value for key, value in dial.items()})
    random_a = make_plan(limited, shapes_of(limited), GPU)
    assert random_a.phase("measure").flops == pytest.approx(1.5 * measured.flops, rel=0.02)
    steps = [{one.collective: one for one in p.phase("train").wire}["all_reduce"] for p in (plan, random_a)]
    assert steps[1].bytes - steps[0].bytes == 8 * 560
    # A longer batch gathers the model less often.
    wide = make_plan(changed(recipe, calibration__batch_size=4), shapes, GPU).phase("measure")
    assert wide.sent(8) < measured.sent(8) / 3
    assert wide.gpu_bytes > measured.gpu_bytes
