"""One engine through every case of the parity tests, in one group of ranks; what it found goes back to the tests."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.stages import as_bytes, quantised_layers, started
from helpers.world import make_base, make_recipe, make_texts, merge, write_rows, zero_config
from nslora_dist import dist
from nslora_dist.adapter import adapted_linears
from nslora_dist.effects import divergence, interference, summarise
from nslora_dist.errors import UserError
from nslora_dist.pipeline import Run

ENGINES = {"single": 1, "zero3": 2, "fsdp2": 2}
IDS = torch.randint(3, 63, (2, 12), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Case:
    """A recipe of the toy world.

    Attributes:
        changes: laid over the recipe.
        steps: optimizer steps.
        base: folder name of the base.
        null_space: the case whose null space it starts from; its own name by default.
        keep_small: whether ZeRO-3 keeps small parameters whole, as it does by default.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    steps: int = 20
    base: str = "llama"
    null_space: str | None = None
    keep_small: bool = False


def _case(steps: int = 20, *, adapter: Any = None, base_model: Any = None, train: Any = None, **more: Any) -> Case:
    changes = {"adapter": adapter or {}, "base_model": base_model or {}, "train": train or {}}
    return Case(changes, steps, **more)


ALPHA = {"alpha": 12.0}  # not the rank, so that a scale forgotten or applied twice shows
V1 = {"form": "residual", "freeze_a": False}
V2 = {"form": "residual"}
BF16 = {"dtype": "bfloat16"}
NF4 = {"quantization": "nf4"}
NULL_LORA = {"method": "null_lora", "null_dim": 16, "null_threshold": 0.3}  # leaves ranks 8, 4 and 2 of 8

CASES: dict[str, Case] = {
    "delta": _case(adapter=ALPHA),
    # Decay pulls D = B - B0 to zero in delta form and B itself in residual form: the two agree without it alone.
    "delta_no_decay": _case(
        adapter=ALPHA, train={"weight_decay": 0.0, "activation_checkpointing": True}, null_space="delta"
    ),
    "v2": _case(adapter=ALPHA | V2, train={"weight_decay": 0.0}),
    "v1": _case(6, adapter=ALPHA | V1, null_space="v2"),
    "lora": _case(3, adapter=ALPHA | {"method": "lora"}),
    "nf4": _case(base_model=NF4),
    "bf16": _case(8, adapter=ALPHA, base_model=BF16),
    "nf4_bf16": _case(8, base_model=BF16 | NF4),
    "v1_bf16": _case(3, adapter=V1, base_model=BF16),
    "v2_bf16": _case(3, adapter=V2, base_model=BF16, null_space="v1_bf16"),
    "v1_nf4": _case(3, adapter=V1, base_model=NF4),
    "v2_nf4_bf16": _case(3, adapter=V2, base_model=BF16 | NF4),
    "biases_tied": _case(3, base="qwen25_tied_window"),
    "biases": _case(3, base="qwen2", keep_small=True),
    "null_lora": _case(6, adapter=ALPHA | NULL_LORA, train={"activation_checkpointing": True}),
    # At 0.23 some weights have no null space, and their modules are left out.
    "null_lora_nf4": _case(6, adapter=NULL_LORA | {"null_threshold": 0.23}, base_model=NF4),
    "null_lora_bf16": _case(3, adapter=NULL_LORA, base_model=BF16),
    "null_lora_nf4_bf16": _case(3, adapter=NULL_LORA, base_model=BF16 | NF4),
}


@dataclass
class Found:
    """What a case left behind.

    Attributes:
        losses: one per optimizer step.
        norms: gradient norm before clipping, one per step.
        before: every frozen parameter's bytes by name, before training.
        changed: frozen parameters whose bytes training changed.
        factors: "A", "B", in residual form "A0", "B0", of Null-LoRA "V", "U", by module, as gathered.
        scale: alpha / rank.
        live: name → module → interference as the pipeline reports it.
        forward: the same by a forward pass.
        divergence: name → mean KL(base ‖ adapted), nats a token.
        summary: the report's summary of ``live``.
        logits: float32 (b, s - 1, vocabulary) for ``IDS`` after training, and ``start`` before it.
        adapter: the exported folder.
        texts: name → (weight or None, sequences that were calibrated on).
    """

    losses: list[float]
    norms: list[float]
    before: dict[str, Tensor]
    changed: list[str]
    factors: dict[str, dict[str, Tensor]]
    scale: float
    live: dict[str, dict[str, float]]
    forward: dict[str, dict[str, float]]
    divergence: dict[str, float]
    summary: dict[str, Any]
    logits: Tensor
    start: Tensor
    adapter: Path
    texts: dict[str, tuple[float | None, list[Tensor]]]


def prepare(folder: Path) -> Path:
    """Bases and texts of all cases."""
    make_texts(folder)
    for case in CASES.values():
        if not (folder / case.base).exists():
            make_base(folder / case.base, case.base)
    return folder


def run_engine(engine: str, world: Path, names: Sequence[str] = tuple(CASES)) -> dict[str, Any]:
    """The cases named, with the null spaces that ``single`` left: ``Found`` on rank 0, the losses on others."""
    found = {}
    for name in names:
        case = CASES[name]
        space = world / "single" / (case.null_space or name) / "null_space"
        found[name] = _run_case(engine, case, world, world / engine / name, space)
    return found if dist.is_main() else {name: f.losses for name, f in found.items()}


def _settings(engine: str, world: Path, case: Case) -> dict[str, Any]:
    settings: dict[str, Any] = {"name": engine}
    if engine == "zero3" and not case.keep_small:
        with dist.together("config"):
            if dist.is_main():
                zero_config(world)
        settings["config"] = str(world / "zero.json")
    return settings


def _run_case(engine: str, case: Case, world: Path, output: Path, space: Path) -> Found:
    changes = case.changes | {"engine": _settings(engine, world, case)}
    changes["train"] = case.changes["train"] | {"max_steps": case.steps}
    changes["calibration"] = {"solver": {"placement": "spread" if engine == "zero3" else "rank0"}}
    recipe = make_recipe(world, world / case.base, output, **changes)
    own = engine == "single" and space.parent == output
    with started(recipe, null_space=None if own else space) as stage:
        start = stage.logits(IDS)
        before = stage.frozen()
        trained = stage.train()
        after = stage.frozen()
        assert before.keys() == after.keys()
        effects = stage.effects(batch_size=3)
        live, forward, together = stage.interference(effects), interference(effects), divergence(effects)
        factors = {}
        for name, module in adapted_linears(stage.engine.model).items():
            found = {key: getattr(module, value, None) for key, value in PARTS.items()}
            factors[name] = {key: stage.engine.gather(value) for key, value in found.items() if value is not None}
        return Found(
            losses=trained.losses,
            norms=trained.grad_norms,
            before=before,
            changed=[name for name in before if not torch.equal(before[name], after[name])],
            factors=factors,
            scale=recipe.adapter.scale,
            live=_numbers(live),
            forward=_numbers(forward),
            divergence=together,
            summary=summarise(live, stage.run.texts, together),
            logits=stage.logits(IDS),
            start=start,
            adapter=stage.export(output / "exported"),
            texts={t.name: (t.weight, t.calibration) for t in stage.run.texts},
        )


PARTS = {"A": "lora_A", "B": "lora_B", "A0": "start_A", "B0": "start_B", "V": "null_in", "U": "null_out"}


def _numbers(found: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    return {name: {module: float(value) for module, value in values.items()} for name, values in found.items()}


def dense_update(parts: dict[str, Tensor], scale: float) -> Tensor:
    """ΔW in float64."""
    parts = {key: value.double() for key, value in parts.items()}
    if "V" in parts:
        half, (d_out, d_in) = len(parts["A"]), (len(parts["U"]), len(parts["V"]))
        confined = parts["U"] @ (parts["U"].T @ parts["B"]), parts["A"] @ parts["V"] @ parts["V"].T
        fourth = (d_in / d_out) ** 0.25
        first = confined[0] @ (fourth * parts["V"][:, :half].T)
        return scale * (first + parts["U"][:, :half] / fourth @ confined[1])
    update = parts["B"] @ parts["A"]
    if "B0" in parts:
        update = update - parts["B0"] @ parts.get("A0", parts["A"])
    return scale * update


@dataclass(frozen=True)
class Packed:
    """A 4-bit layer's bytes as gathered at rest and as each of its forward and backward passes saw them."""

    gathered: Tensor
    forward: list[Tensor]
    backward: list[Tensor]


def packed_bytes(engine: str, world: Path, dtype: str) -> dict[str, Packed]:
    """The packed bytes of every 4-bit linear of the base ``adversarial``."""
    changes = {
        "base_model": {"dtype": dtype, "quantization": "nf4"},
        "adapter": {"method": "lora"},
        "train": {"max_steps": 1},
        "engine": _settings(engine, world, Case()),
    }
    recipe = make_recipe(world, world / "adversarial", world / engine / f"packed_{dtype}", **changes)
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    with copying_as_on_cuda(), started(recipe) as stage:
        layers = quantised_layers(stage.engine)
        for name, layer in layers.items():
            _watch_dense(name, layer, seen)
        stage.train()
        for layer in layers.values():
            del layer.dense
        return {
            name: Packed(as_bytes(stage.engine.gather(layer.weight)), *seen[name]) for name, layer in layers.items()
        }


@contextmanager
def copying_as_on_cuda() -> Iterator[None]:
    """While open, ``_foreach_copy_`` sends every bfloat16 number through float32, which leaves one NaN of all of them.

    So does CUDA's kernel (``UnaryOpFunctor`` in ATen/native/cuda/ForeachFunctors.cuh); on a CPU it copies bytes.
    """
    plain = torch._foreach_copy_

    def rounding(into: Any, values: Any, *rest: Any, **named: Any) -> Any:
        if all(one.dtype == other.dtype == torch.bfloat16 for one, other in zip(into, values, strict=True)):
            values = [torch.where(v.isnan(), torch.full_like(v, torch.nan), v) for v in values]
        return plain(into, values, *rest, **named)

    torch._foreach_copy_ = rounding
    try:
        yield
    finally:
        torch._foreach_copy_ = plain


def _watch_dense(name: str, layer: Any, seen: dict[str, tuple[list[Tensor], list[Tensor]]]) -> None:
    unpack = layer.dense

    def dense(weight: Tensor) -> Tensor:
        in_backward = torch._C._current_graph_task_id() != -1
        seen.setdefault(name, ([], []))[in_backward].append(as_bytes(weight))
        return unpack(weight)

    layer.dense = dense


def non_finite(engine: str, world: Path) -> dict[str, str]:
    """The message that ended each of three hopeless trainings."""
    rows = [{"prompt": f"w{number} w2", "response": "w3"} for number in range(16)]
    said = {}
    for name, changes in {
        "rate": {"train": {"learning_rate": 1e30, "max_steps": 4, "stop_after_skipped": 3}},
        "head": {"base_model": {"path": str(world / "poisoned_head")}},
        "token": {
            "base_model": {"path": str(world / "poisoned_token")},
            "data": {"path": str(world / "one_bad_row.jsonl")},
        },
    }.items():
        with dist.together("rows"):
            if dist.is_main():
                write_rows(world / "one_bad_row.jsonl", one_bad_row(rows))
        changes["train"] = {"stop_after_skipped": 1} | changes.get("train", {})
        settings = changes | {"adapter": {"method": "lora"}, "engine": _settings(engine, world, Case())}
        recipe = make_recipe(world, world / "llama", world / engine / f"bad_{name}", **settings)
        with started(recipe) as stage:
            try:
                said[name] = f"no error; losses {stage.train().losses}"
            except UserError as error:
                said[name] = str(error)
    return said


def one_bad_row(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """``rows`` with the poisoned word in one prompt."""
    return [*rows[:5], rows[5] | {"prompt": "w1 w60"}, *rows[6:]]


def cuda_losses(engine: str, world: Path, names: Sequence[str]) -> dict[str, list[float]]:
    """The losses of the cases named, on this rank's GPU."""
    device = torch.device("cuda", dist.rank())
    losses = {}
    for name in names:
        case = CASES[name]
        changes = case.changes | {"engine": _settings(engine, world, case)}
        changes["train"] = case.changes["train"] | {"max_steps": case.steps}
        recipe = make_recipe(world, world / case.base, world / f"cuda_{engine}" / name, **changes)
        space = None if engine == "single" else world / "cuda_single" / name / "null_space"
        with started(recipe, null_space=space, device=device) as stage:
            losses[name] = stage.train().losses
    return losses


CUDA_RUNS: dict[str, dict[str, Any]] = {
    "budget": {
        "adapter": {"method": "lora", "freeze_a": True, "interference_budget": 0.01, "budget_over": "total"},
        "train": {"max_grad_norm": 1.0},
    },
    "delta_nf4": {"base_model": BF16 | NF4},
    "null_lora_bf16": {"base_model": BF16, "adapter": NULL_LORA},
    "v1_bf16": {"base_model": BF16, "adapter": V1},
}


def cuda_reports(engine: str, world: Path) -> dict[str, dict[str, Any]]:
    """The whole way of ``CUDA_RUNS`` on this rank's GPU, from calibration to adapter and report."""
    reports = {}
    for name, changes in CUDA_RUNS.items():
        settings = merge({"train": {"max_steps": 6}, "engine": _settings(engine, world, Case())}, changes)
        recipe = make_recipe(world, world / "llama", world / f"cuda_run_{engine}" / name, **settings)
        reports[name] = Run(recipe, torch.device("cuda", dist.rank())).train()
    return reports
