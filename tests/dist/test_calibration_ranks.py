"""The null space does not depend on ranks, padding or placement, and is what docs/methods.md says it is."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.calibration_run import (
    Calibrated,
    Reference,
    activations,
    calibrate,
    live_grams,
    reference_grams,
    refused,
    used_again,
    weights,
)
from helpers.ranks import run_ranks
from helpers.world import change_weights, make_base, make_texts, tokenizer, words, write_rows

RANK = 8
RESIDUAL = {"adapter": {"rank": RANK, "form": "residual"}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "main": ("llama", RESIDUAL),
    # A basis of all 64 directions: U (Uᵀ G U) Uᵀ is the Gram itself, as the artifact holds it.
    "whole": ("square", {"adapter": {"rank": 64, "a_init": "orthonormal"}}),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "unpadded": ("llama", RESIDUAL | {"calibration": {"batch_size": 1}}),
    "one_batch": ("llama", RESIDUAL | {"calibration": {"batch_size": 17}}),
    "spread": ("llama", RESIDUAL | {"calibration": {"solver": {"method": "eigh", "placement": "spread"}}}),
    "no_probe": ("llama", RESIDUAL | {"calibration": {"probes": {}}}),
    "host": ("llama", RESIDUAL | {"calibration": {"hidden_states": "host"}}),
}
NAMES = ("a", "b", "p", "calibration")
GRAM = 1e-5
"""float32 sums of a few hundred products, in any order, against float64 ones: relative to the Gram's norm."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_texts(tmp_path_factory.mktemp("calibration"))
    make_base(folder / "llama")
    make_base(folder / "square", intermediate_size=64)
    return folder


@pytest.fixture(scope="module")
def found(world: Path) -> dict[int, list[dict[str, Calibrated]]]:
    """World size → what each rank saw."""
    return {size: run_ranks(calibrate, size, world, CASES | (MORE if size < 4 else {})) for size in (1, 2, 4)}


@pytest.fixture(scope="module")
def references(world: Path, found: Any) -> dict[str, dict[str, Reference]]:
    """Case → group → dense float64 Grams of the very sequences."""
    made = {}
    for name, (base, _) in CASES.items():
        case = found[1][0][name]
        made[name] = reference_grams(world / base, case.texts, groups_of(case))
    return made


def groups_of(case: Calibrated) -> dict[str, list[str]]:
    return {name: entry["modules"] for name, entry in case.manifest["groups"].items()}


def projector(basis: Tensor) -> Tensor:
    return basis.double() @ basis.double().T


def gap_bound(gram: Tensor) -> float:
    """How far the projector of the RANK smallest may turn if the Gram is off by GRAM/20 of its norm (Davis, Kahan)."""
    values = torch.linalg.eigvalsh(gram)
    return 2 * float(GRAM / 20 * values[-1] / (values[RANK] - values[RANK - 1]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_grams_are_the_sum_over_all_tokens(found: Any, references: Any, size: int) -> None:
    case = found[size][0]["whole"]
    for group, reference in references["whole"].items():
        basis = case.tensors[f"{group}.basis"].double()
        torch.testing.assert_close(basis.T @ basis, torch.eye(64, dtype=torch.float64), atol=1e-6, rtol=0)
        for name in NAMES:
            gram = basis @ case.tensors[f"{group}.update_gram.{name}"].double() @ basis.T
            expected = reference.grams[name]
            assert (gram - expected).norm() < GRAM * expected.norm(), f"{group} {name}"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_change_nothing(found: Any, references: Any, size: int, case: str) -> None:
    alone, many = found[1][0][case], found[size][0][case]
    compare(alone, many, {g: r.grams["calibration"] for g, r in references[case].items()}, whole=case == "whole")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", [name for name in MORE if name != "no_probe"])
def test_padding_and_placement_change_nothing(found: Any, references: Any, size: int, case: str) -> None:
    compare(
        found[1][0]["main"], found[size][0][case], {g: r.grams["calibration"] for g, r in references["main"].items()}
    )


def compare(one: Calibrated, other: Calibrated, grams: dict[str, Tensor], *, whole: bool = False) -> None:
    """The same bases, as projectors; in them, the same small Grams; the same energies and leaks."""
    assert one.manifest["tokens"] == other.manifest["tokens"] and one.tensors.keys() == other.tensors.keys()
    assert one.manifest["groups"].keys() == other.manifest["groups"].keys() == grams.keys()
    for group, gram in grams.items():
        top = float(torch.linalg.matrix_norm(gram, 2))
        bases = [case.tensors[f"{group}.basis"] for case in (one, other)]
        if not whole:
            bound = gap_bound(gram)
            assert bound < 0.2, f"{group}: the spectrum has no gap, the bound says nothing"
            assert torch.linalg.matrix_norm(projector(bases[0]) - projector(bases[1]), 2) < bound, group
        for name in NAMES:
            small = [case.tensors[f"{group}.update_gram.{name}"].double() for case in (one, other)]
            lifted = [b.double() @ s @ b.double().T for b, s in zip(bases, small, strict=True)]
            # Inside a turned basis a small Gram changes by the turn times G; for a whole one not at all.
            slack = GRAM if whole else GRAM + 2 * gap_bound(gram)
            assert torch.linalg.matrix_norm(lifted[0] - lifted[1], 2) < slack * top * 3, f"{group} {name}"
        leaks = [case.manifest["groups"][group]["leak"] for case in (one, other)]
        assert leaks[0] == pytest.approx(leaks[1], rel=2e-3), group
    for module, entry in one.manifest["modules"].items():
        assert entry["references"] == pytest.approx(other.manifest["modules"][module]["references"], rel=1e-5), module


def test_every_rank_starts_alike(found: Any) -> None:
    for ranks in found.values():
        for case, first in ranks[0].items():
            for other in ranks[1:]:
                assert other[case].manifest == first.manifest and other[case].tensors == {}
                for module, start in first.starts.items():
                    assert torch.equal(other[case].starts[module].a, start.a)
                    assert (start.b is None) == (other[case].starts[module].b is None)
                    assert start.b is None or torch.equal(other[case].starts[module].b, start.b)
                    for name in start.update_grams:
                        assert torch.equal(other[case].starts[module].update_grams[name], start.update_grams[name])


def test_probes_do_not_shape_the_basis(found: Any) -> None:
    for size in (1, 2):
        with_probe, without = found[size][0]["main"], found[size][0]["no_probe"]
        for name, value in without.tensors.items():
            assert torch.equal(value, with_probe.tensors[name]), name
        assert {n for n in with_probe.tensors if n not in without.tensors} == {
            f"{group}.update_gram.p" for group in with_probe.manifest["groups"]
        }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_against_the_formulas(world: Path, found: Any, references: Any, size: int) -> None:
    """docs/methods.md §1, dense and in float64: W U Uᵀ is formed and decomposed whole, as the code never does."""
    case = found[size][0]["main"]
    dense = weights(world / "llama", list(case.manifest["modules"]))
    for group, reference in references["main"].items():
        gram = reference.grams["calibration"]
        values, vectors = torch.linalg.eigh(gram)
        basis = case.tensors[f"{group}.basis"].double()
        floor = GRAM / 5 * values[-1]
        assert torch.allclose(basis.T @ basis, torch.eye(RANK, dtype=torch.float64), atol=1e-6)
        assert torch.linalg.matrix_norm(projector(basis) - projector(vectors[:, :RANK]), 2) < gap_bound(gram)
        eigenvalues = case.tensors[f"{group}.eigenvalues"].double()
        torch.testing.assert_close(eigenvalues, values[:RANK], atol=float(floor), rtol=1e-3)
        spectrum = case.tensors[f"{group}.spectrum"].double().sort().values
        torch.testing.assert_close(spectrum, values, atol=float(floor), rtol=1e-3)

        leak = case.manifest["groups"][group]["leak"]
        assert leak["calibration"] == pytest.approx(float((basis.T @ gram @ basis).trace() / gram.trace()), rel=1e-3)
        held = {n: float((basis.T @ g @ basis).trace() / g.trace()) for n, g in reference.heldout.items()}
        assert held.keys() == {"a", "b"} and leak["heldout"] == pytest.approx((held["a"] + 2 * held["b"]) / 3, rel=1e-4)
        assert 0.2 < leak["random"] * len(gram) / RANK < 5.0
        assert leak["calibration"] < 0.2 * leak["random"]

        for module in groups_of(case)[group]:
            w, start = dense[module], case.starts[module]
            p, s, q = torch.linalg.svd(w @ basis @ basis.T)
            root = s[:RANK].sqrt()
            a0, b0 = root[:, None] * q[:RANK], p[:, :RANK] * root
            assert start.b is not None
            mine_a, mine_b = start.a.double(), start.b.double()
            # Singular vectors are only known up to their signs; these three products determine A₀ and B₀ up to those.
            scale = float(s[0])
            torch.testing.assert_close(mine_b @ mine_a, b0 @ a0, atol=1e-5 * scale, rtol=0)
            torch.testing.assert_close(mine_a.T @ mine_a, a0.T @ a0, atol=1e-5 * scale, rtol=0)
            torch.testing.assert_close(mine_b @ mine_b.T, b0 @ b0.T, atol=1e-5 * scale, rtol=0)
            for name in NAMES:
                g = reference.grams[name]
                energy = float((w @ g @ w.T).trace())
                assert start.references[name] == pytest.approx(energy, rel=1e-5), f"{module} {name}"
                expected = mine_a @ g @ mine_a.T
                rounding = GRAM / 5 * float(torch.linalg.matrix_norm(g, 2)) * scale
                torch.testing.assert_close(start.update_grams[name].double(), expected, atol=rounding, rtol=1e-3)


def test_mixture_is_balanced(found: Any, references: Any) -> None:
    """b has more tokens than a, and weight 2: what it adds to the mixture is twice a's part, whatever its length."""
    tokens = found[1][0]["main"].manifest["tokens"]
    assert tokens["b"] > 1.5 * tokens["a"]
    case = found[2][0]["whole"]
    for group, reference in references["whole"].items():
        basis = case.tensors[f"{group}.basis"].double()
        small = {n: case.tensors[f"{group}.update_gram.{n}"].double() for n in NAMES}
        grams = [basis @ small[n] @ basis.T for n in ("a", "b", "calibration")]
        parts = torch.stack([grams[0].flatten(), grams[1].flatten()], 1)
        share = torch.linalg.lstsq(parts, grams[2].flatten()[:, None]).solution.flatten()
        energies = share * torch.stack([reference.grams[n].trace() for n in ("a", "b")])
        assert float(energies[1] / energies[0]) == pytest.approx(2.0, rel=1e-3), group


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_live_model_gives_the_same_grams(tmp_path: Path, engine: str) -> None:
    """Through a sharded model with biases, whose ranks have different numbers of batches."""
    make_texts(tmp_path)
    base = make_base(tmp_path / "qwen2", "qwen2")
    first, second = run_ranks(live_grams, 2, tmp_path, "qwen2", engine)
    grams, sequences = first
    dense = weights(base, [name for _, outputs in grams.values() for name in outputs])
    x = activations(base, sequences, list(grams))
    for group, (gram, outputs) in grams.items():
        assert torch.equal(gram, second[0][group][0])
        expected = x[group] @ x[group].T
        assert (gram - expected).norm() < GRAM * expected.norm(), group
        for module, energy in outputs.items():
            assert energy == pytest.approx(float((dense[module] @ x[group]).square().sum()), rel=1e-5), module


def test_non_finite_activation_names_module_and_row(tmp_path: Path) -> None:
    make_texts(tmp_path)
    base = make_base(tmp_path / "llama")
    bad = tokenizer().convert_tokens_to_ids("w60")
    dice = random.Random(3)
    rows = [{"text": words(dice, 4, 9)} for _ in range(20)]
    write_rows(tmp_path / "a.jsonl", [*rows[:9], {"text": "w5 w60 w7"}, *rows[10:]])

    def set_nan(name: str, row: int) -> Any:
        def change(tensors: dict[str, Tensor]) -> None:
            tensors[name][row, 3] = torch.nan

        return change

    change_weights(base, tmp_path / "token", set_nan("model.embed_tokens.weight", bad))
    change_weights(base, tmp_path / "value", set_nan("model.layers.1.self_attn.v_proj.weight", 2))
    change_weights(base, tmp_path / "last", set_nan("model.layers.1.mlp.down_proj.weight", 2))
    single = {"calibration": {"batch_size": 1, "heldout_fraction": 0.0}}
    first, second = run_ranks(refused, 2, tmp_path, {"token": single, "value": single, "last": single})
    assert first == second, "ranks tell different stories"
    for case, module, where in (
        (
            "token",
            r"layers\.0\.self_attn\.q_proj",
            r"batch \d+ on rank \d, which begins in line 10 \(the first is 1\);",
        ),
        ("value", r"layers\.1\.self_attn\.v_proj", r"batch 0 on rank 0, which begins in line \d+ "),
        ("last", r"layers\.1\.mlp\.down_proj", r"batch 0 on rank 0, which begins in line \d+ "),
    ):
        assert re.search(rf"^calibration\.sources\.a: .*model\.{module} is not finite .*{where}", first[case]), first[
            case
        ]


def test_null_space_on_disk(tmp_path: Path) -> None:
    """The same base, data and settings use it again, others calibrate, and a damaged one is refused and left alone."""
    make_texts(tmp_path)
    make_base(tmp_path / "llama")
    first, second = run_ranks(used_again, 2, tmp_path)
    assert first.keys() == second.keys()
    for said in (first, second):
        assert said["same"] == said["another engine, batch and rate"] == "uses it again"
        for change in ("another seed", "another rank", "another dtype", "other texts"):
            assert said[change] == "calibrates", change
        assert said["key"] == "new"
        assert said["damaged"].startswith("refuses: ") and "null_space" in said["damaged"]
    assert first["damaged"] == second["damaged"]
