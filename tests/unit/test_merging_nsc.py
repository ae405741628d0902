"""Null-space compression: ω against a direct projection, λ's gradient against finite differences, what stays put."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.merge_world import LISTED, load, make_adapter, make_model, recipe, write_inputs
from nslora_dist.merge_recipe import MergeRecipe, NscSection
from nslora_dist.merging.blocks import block_of, target_blocks
from nslora_dist.merging.inputs import TaskInputs, read_inputs
from nslora_dist.merging.merged_linear import MergedLinear
from nslora_dist.merging.model import MergedModel, load_merged
from nslora_dist.merging.nsc import NscResult, optimise
from nslora_dist.merging.null_ratio import null_ratio, scale_columns, whitening
from nslora_dist.merging.tasks import Task, read_tasks

CPU = torch.device("cpu")


def projected_ratio(x: Tensor, a: Tensor) -> Tensor:
    """‖x − its projection on A's rows‖ / ‖x‖ through an orthonormal basis of the rows."""
    _, s, vt = torch.linalg.svd(a.double(), full_matrices=False)
    rows = vt[s > 1e-9 * s[0]]
    x = x.double()
    return (x - x @ rows.T @ rows).norm(dim=-1) / x.norm(dim=-1)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_ratio_is_the_direct_projection(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a = scale * torch.randn(5, 32, generator=generator)
    a[1] = a[0] + 1e-2 * a[1]  # hardly independent
    x = torch.randn(3, 7, 32, generator=generator)
    x[0, 0] = a[2] / scale + 0.05 * x[0, 0]  # nearly all inside
    found = null_ratio(x, x @ a.T, whitening(a))
    assert found.shape == (3, 7) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), projected_ratio(x, a), atol=2e-4, rtol=0)
    exact = null_ratio(x.double(), x.double() @ a.double().T, whitening(a))
    torch.testing.assert_close(exact, projected_ratio(x, a), atol=1e-7, rtol=1e-3)


def test_ratio_where_there_is_nothing_to_divide() -> None:
    a = torch.eye(3, 8)
    x = torch.zeros(2, 8, requires_grad=True)
    ratio = null_ratio(x, x @ a.T, whitening(a))
    assert torch.equal(ratio.detach(), torch.ones(2))
    inside = a[:1].clone().requires_grad_()  # wholly in the row space: the root has no slope there
    whole = null_ratio(inside, inside @ a.T, whitening(a))
    (ratio.sum() + whole.sum()).backward()
    assert float(whole.detach()) < 1e-3 and torch.isfinite(x.grad).all() and torch.isfinite(inside.grad).all()  # type: ignore[arg-type]


def test_derivatives_of_ratio_and_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    columns = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: null_ratio(v, v @ a.T, whitening(a)), (x,))
    assert torch.autograd.gradcheck(lambda v, c: scale_columns(v @ a.T, c), (x, columns))


def test_zero_down_projection_has_no_row_space() -> None:
    with pytest.raises(ValueError, match="zero"):
        whitening(torch.zeros(2, 5))


def test_blocks_and_targets() -> None:
    names = [f"bert.encoder.layer.{n}.{part}" for n in range(12) for part in ("a.query", "output")]
    assert block_of(names[3]) == "bert.encoder.layer.1" and block_of("bert.pooler.dense") == "bert.pooler.dense"
    assert target_blocks([*names, "bert.pooler.dense"], 0.25) == {f"bert.encoder.layer.{n}" for n in (9, 10, 11)}
    assert target_blocks(names, 1e-9) == {"bert.encoder.layer.11"}
    assert len(target_blocks(names, 1.0)) == 12
    assert target_blocks(["first", "second"], 0.5) == {"second"}


def job(folder: Path, family: str, **nsc: Any) -> MergeRecipe:
    """Adapters of rank 3 (with another rank in one module and rsLoRA) and 5."""
    base = make_model(folder / "base", family)
    uneven = {"rank_pattern": {LISTED[family][0]: 2}, "use_rslora": True}
    adapters = {
        "a": make_adapter(folder / "a", base, family, seed=1, r=3, **uneven),
        "b": make_adapter(folder / "b", base, family, seed=2, r=5),
    }
    return recipe(base, adapters, folder / "out", method="nsc", inputs=write_inputs(folder, family), nsc=nsc)


def start(job: MergeRecipe) -> tuple[MergedModel, dict[str, TaskInputs], NscSection]:
    section, base = job.nsc, job.base_model
    assert section is not None and base is not None
    tasks = read_tasks(job)
    initial = list(job.coefficients(section.initial).values())
    model = load_merged(base, tasks, granularity=section.granularity, initial=initial, device=CPU)
    return model, read_inputs(job.inputs, base, seed=0), section


def search(job: MergeRecipe) -> NscResult:
    model, inputs, section = start(job)
    return optimise(model, ["a", "b"], inputs, section, device=CPU)


class Reference:
    """Mean ω over tasks and target modules with dense merged weights in float64, hooks and a direct projection."""

    def __init__(self, job: MergeRecipe, family: str, rows: dict[str, int]) -> None:
        assert job.base_model is not None and job.nsc is not None
        self.tasks, self.rows = read_tasks(job), rows
        self.model = load(Path(job.base_model.path), family, torch.float64)
        self.plain = {n: self.model.get_submodule(n).weight.detach().clone() for n in self.tasks[0].factors}
        ordered = [n for n, _ in self.model.named_modules() if n in self.plain]
        self.targets = target_blocks(ordered, job.nsc.target_fraction)
        self.inputs = read_inputs(job.inputs, job.base_model, seed=0)

    @torch.no_grad()
    def loss(self, table: Tensor) -> float:
        for name, plain in self.plain.items():
            weight = self.model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.copy_(plain)
            for k, task in enumerate(self.tasks):
                found = task.factors[name]
                row = self.rows[name if name in self.rows else block_of(name)]
                weight += float(table[row, k]) * found.lora_b.double() @ found.lora_a.double()
        return sum(self._ratio(task) for task in self.tasks) / len(self.tasks)

    def _ratio(self, task: Task) -> float:
        arguments, mask = self.inputs[task.name].batch(list(range(7)))
        seen: dict[str, Tensor] = {}
        hooks = [
            self.model.get_submodule(name).register_forward_pre_hook(lambda m, args, n=name: seen.update({n: args[0]}))
            for name in task.factors
            if block_of(name) in self.targets
        ]
        self.model(**{n: v.double() if v.is_floating_point() else v for n, v in arguments.items()})
        for hook in hooks:
            hook.remove()
        ratios = []
        for name, x in seen.items():
            ratio = projected_ratio(x, task.factors[name].lora_a)
            ratios.append(float(ratio.mean() if mask is None else ratio[mask.bool()].mean()))
        return sum(ratios) / len(ratios)


@pytest.mark.parametrize(
    ("family", "granularity"), [("llama", "block"), ("llama", "module"), ("bert", "module"), ("vit", "block")]
)
def test_loss_and_gradient_against_finite_differences(tmp_path: Path, family: str, granularity: str) -> None:
    toy = job(tmp_path, family, granularity=granularity, target_fraction=0.5, batch_size=7, steps=1)
    model, inputs, section = start(toy)
    result = optimise(model, ["a", "b"], inputs, section, device=CPU)
    rows, grad = model.coefficients.rows, model.coefficients.table.grad
    assert grad is not None
    reference = Reference(toy, family, rows)
    at = torch.full(grad.shape, 0.4, dtype=torch.float64)
    assert result.losses[0] == pytest.approx(reference.loss(at), rel=1e-5)
    largest = float(grad.abs().max())
    assert largest > 1e-5
    for name in [next(iter(rows)), *result.unmoved[-1:], list(rows)[len(rows) // 2]]:
        for task in range(2):
            step = torch.zeros_like(at)
            step[rows[name], task] = 1e-4
            difference = (reference.loss(at + step) - reference.loss(at - step)) / 2e-4
            assert float(grad[rows[name], task]) == pytest.approx(difference, abs=1e-3 * largest), name


def test_coefficients_without_a_target_downstream_stay(tmp_path: Path) -> None:
    result = search(job(tmp_path, "llama", granularity="module", steps=1, batch_size=4, learning_rate=1e-2))
    # In the last block q and v read what no λ of the block changes; down is the last linear of all.
    assert result.unmoved == ["model.layers.3.mlp.down_proj"]
    assert result.coefficients["model.layers.3.mlp.down_proj"] == [pytest.approx(0.4)] * 2
    moved = [v for row, values in result.coefficients.items() if row not in result.unmoved for v in values]
    assert all(abs(value - 0.4) > 5e-3 for value in moved)  # AdamW's first step is the learning rate
    assert result.target_blocks == ["model.layers.3"] and len(result.losses) == 1


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_search_lowers_the_ratio(tmp_path: Path, family: str, quantization: str) -> None:
    toy = job(tmp_path, family, steps=12, batch_size=7, learning_rate=3e-2, target_fraction=0.5)
    base = {"base_model": toy.base_model.model_copy(update={"quantization": quantization})}  # type: ignore[union-attr]
    result = search(toy.model_copy(update=base))
    assert result.losses[-1] < result.losses[0] - 1e-4
    targets = result.target_blocks
    assert len(targets) == 2
    before, after = (
        sum(blocks[b][when] for blocks in result.profile.values() for b in targets) / 4 for when in ("before", "after")
    )
    # All inputs in one batch, and as many modules in each target block: the profile's mean is the loss.
    assert before == pytest.approx(result.losses[0], rel=1e-5)
    assert after < result.losses[-1] + 1e-5 < before


def test_bfloat16_base_moves_the_same_way(tmp_path: Path) -> None:
    toy = job(tmp_path, "llama", steps=6, batch_size=7, learning_rate=1e-2, target_fraction=0.5)
    base = {"base_model": toy.base_model.model_copy(update={"dtype": "bfloat16"})}  # type: ignore[union-attr]
    plain, rounded = search(toy), search(toy.model_copy(update=base))
    assert rounded.losses == pytest.approx(plain.losses, rel=5e-3)
    for row, values in plain.coefficients.items():
        assert rounded.coefficients[row] == pytest.approx(values, abs=0.02)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    toy = job(tmp_path, "bert", steps=3, batch_size=4, learning_rate=1e-2)
    assert toy.nsc is not None
    again = toy.model_copy(update={"nsc": toy.nsc.model_copy(update={"activation_checkpointing": True})})
    plain, saved = search(toy), search(again)
    assert saved.losses == pytest.approx(plain.losses, rel=1e-6)
    for row, values in plain.coefficients.items():
        assert saved.coefficients[row] == pytest.approx(values, rel=1e-5)


def test_memory_for_backward_does_not_hold_a_dense_update(tmp_path: Path) -> None:
    """No tensor of d_out × d_in elements but the frozen weight itself is kept, nor an input that ω does not need."""
    model, _, _ = start(job(tmp_path, "llama", steps=1))
    linear = next(module for module in model.root.modules() if isinstance(module, MergedLinear))
    shapes = []

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            shapes.append(tuple(tensor.shape))
        return tensor

    x = torch.randn(2, 50, linear.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        linear(x).sum().backward()
    width = linear.lora_A.shape[0]
    assert shapes and max(torch.Size(shape).numel() for shape in shapes) == 2 * 50 * width


def test_flat_signal_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make_model(tmp_path / "base", "llama")
    first = make_adapter(tmp_path / "a", base, "llama", seed=1)
    second = make_adapter(tmp_path / "b", base, "llama", seed=2, like=first)
    adapters = {"a": first, "b": second}
    toy = recipe(
        base, adapters, tmp_path / "out", method="nsc", inputs=write_inputs(tmp_path, "llama"), nsc={"steps": 2}
    )
    with caplog.at_level(logging.WARNING):
        result = search(toy)
    told = result.flat(shared=True)
    assert told is not None and "gram" in told and "arithmetic" in told
    told = result.flat(shared=False)  # the same is seen in the figures alone
    assert told is not None and "hardly differs" in told
    assert max(abs(value) for value in result.contrast.values() if value is not None) < 1e-6


@torch.no_grad()
def watched(model: MergedModel, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Module → its input."""
    seen: dict[str, Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda m, args, n=path: seen.update({n: args[0]}))
        for path, linear in model.linears.items()
    ]
    model.root(**arguments)
    for hook in hooks:
        hook.remove()
    return seen


def test_a_trained_down_projection_is_told_apart(tmp_path: Path) -> None:
    """A's that lean on their own task's activations, as training makes them: ω is lower under the own one."""
    toy = job(tmp_path, "vit", steps=1, learning_rate=1e-2, target_fraction=1.0)
    model, inputs, section = start(toy)
    tasks = list(inputs)
    for k, name in enumerate(tasks):
        seen = watched(model, inputs[name].batch(list(range(7)))[0])
        for path, linear in model.linears.items():
            first, last = linear.spans[k]
            leading = torch.linalg.svd(seen[path].flatten(0, -2), full_matrices=False)[2][3 * k : 3 * k + last - first]
            linear.lora_A.data[first:last] = leading
            linear.white[k] = whitening(leading)
    with torch.no_grad():
        model.coefficients.table.zero_()
    result = optimise(model, tasks, inputs, section, device=CPU)
    assert result.contrast["a"] is not None and result.contrast["a"] > 0.05
    assert result.flat(shared=False) is None
