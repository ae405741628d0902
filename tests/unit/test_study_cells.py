"""A study's cells: what their ids depend on, and the file of their lines."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nslora_dist.errors import UserError
from nslora_dist.study.cells import base_folder, cells_of
from nslora_dist.study.knowledge import make_knowledge
from nslora_dist.study.lines import append_line, close_torn_line, of_cells, read_lines
from nslora_dist.study.spec import PIECES, STUDIES, Size, Study, load_study
from nslora_dist.tiny_world import text_of


def tree() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((STUDIES / "quick.yaml").read_text())
    return found


def load(folder: Path, changed: dict[str, Any]) -> Study:
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(changed))
    return load_study(str(path), folder)


def ids(study: Study) -> list[str]:
    return [cell.id for cell in cells_of(study)]


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES.glob("*.yaml")))
def test_every_shipped_study_is_valid(name: str) -> None:
    study = load_study(name)
    cells = cells_of(study)
    assert len({cell.id for cell in cells}) == len(cells)
    assert study.output_dir == f"studies/{name}"


def test_the_frontier_has_what_a_comparison_must_show() -> None:
    study = load_study("frontier")
    for name in study.grids["frontier"].arms:
        arm = study.arms[name]
        assert len(arm.learning_rates) >= 5 and set(arm.weight_decays) >= {0.0, 0.3}
        assert arm.matched == ("neither" if name == "null_lora" else "parameters")
    own = [cell for cell in cells_of(study) if "frontier" in cell.grids]
    for kind, count in (("arm", 9), ("seed", 3), ("task", 3), ("size", 3)):
        assert len({getattr(cell, kind) for cell in own}) == count


def test_ids_depend_on_settings_and_not_on_names(tmp_path: Path) -> None:
    before = ids(load(tmp_path, tree()))
    renamed = tree()
    renamed["arms"] = {{"delta": "ours"}.get(name, name): arm for name, arm in renamed["arms"].items()}
    for grid in renamed["grids"].values():
        grid["arms"] = ["ours" if arm == "delta" else arm for arm in grid["arms"]]
    assert sorted(ids(load(tmp_path, renamed))) == sorted(before)
    assert len(set(before)) == len(before) == 11


@pytest.mark.parametrize(
    ("where", "value", "changed"),
    [
        (("training", "steps"), {"new_facts": 13}, 11),
        (("task_rows", "train_rows"), 150, 11),
        (("sizes", "toy", "people"), 8, 11),
        (("sizes", "toy", "pretraining", "steps"), 61, 11),
        (("sizes", "toy", "seconds"), 3.0, 0),
        (("arms", "pissa", "rank"), 6, 2),
        (("calibrations", "part", "sequences"), 20, 2),
    ],
)
def test_an_id_changes_with_what_its_figures_depend_on(
    tmp_path: Path, where: tuple[str, ...], value: Any, changed: int
) -> None:
    before, other = ids(load(tmp_path, tree())), tree()
    inner = other
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    assert len(set(ids(load(tmp_path, other))) - set(before)) == changed


def test_arms_that_no_calibration_shapes_run_once(tmp_path: Path) -> None:
    both = tree()
    both["grids"]["frontier"]["calibrations"] = ["all", "part"]
    cells = cells_of(load(tmp_path, both))
    assert {cell.calibration for cell in cells if cell.arm in ("lora", "pissa")} == {"all"}
    assert {cell.calibration for cell in cells if cell.arm == "delta"} == {"all", "part"}
    in_both = [cell for cell in cells if set(cell.grids) == {"frontier", "sources"}]
    assert len(in_both) == 2  # the grid `sources` asks for these again


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("grids", "frontier", "arms"), ["lroa"], "did you mean 'lora'"),
        (("grids", "frontier", "tasks"), ["sums"], "there is difference, minimum, new_facts"),
        (("arms", "lora"), {"matched": "rank", "learning_rates": [1.0]}, "either adapter, or peer and rank"),
        (("arms", "lora", "adapter", "rnak"), 3, "rnak"),
        (("calibrations", "all", "sources", "facts", "texts"), ["history"], "no text is called 'history'"),
        (("calibrations", "all", "sources", "sum"), {"texts": ["sum"]}, "a probe's name"),
    ],
)
def test_a_wrong_study_is_named(tmp_path: Path, where: tuple[str, ...], value: Any, said: str) -> None:
    other = tree()
    inner = other
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(UserError) as caught:
        load(tmp_path, other)
    assert said in str(caught.value)


def test_no_such_study() -> None:
    with pytest.raises(UserError, match="did you mean 'frontier'"):
        load_study("fronteer")


def test_knowledge_is_cut_without_overlap(tmp_path: Path) -> None:
    study = load(tmp_path, tree())
    knowledge = make_knowledge(study.sizes["toy"], study.task_rows)
    said = {piece: set(knowledge.texts[piece]) for piece in PIECES}
    assert not [(a, b) for a in said for b in said if a < b and said[a] & said[b]]
    facts = said["facts_named"] | said["facts_unnamed"] | said["facts_rephrased"]
    assert facts == {text_of(row) for row in knowledge.world.pretraining["facts"]}
    for piece in PIECES[:3]:
        assert {text_of(row) for row in knowledge.asked[piece]} <= said[piece]
    for skill in PIECES[3:]:  # pairs of numbers that neither pre-training nor calibration saw
        assert not {text_of(row) for row in knowledge.asked[skill]} & said[skill]


def test_lines_survive_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    close_torn_line(path)
    assert read_lines(path) == ([], 0)
    append_line(path, {"id": "a", "x": 1})
    with path.open("a") as file:
        file.write('{"id": "b", "x"')
    close_torn_line(path)
    close_torn_line(path)
    append_line(path, {"id": "c", "x": 3})
    append_line(path, {"id": "a", "x": 4})
    assert read_lines(path) == ([{"id": "a", "x": 1}, {"id": "c", "x": 3}], 1)
    with pytest.raises(ValueError, match="JSON"):
        append_line(path, {"id": "d", "x": float("nan")})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines() if line.endswith("}")] == ["a", "c", "a"]


def test_lines_take_the_names_of_today(tmp_path: Path) -> None:
    cells = cells_of(load(tmp_path, tree()))
    lines = [{"id": cells[1].id}, {"id": "of another study", "arm": "lora"}, {"id": cells[0].id, "arm": "old name"}]
    found, later = of_cells(lines, cells)
    assert (found["id"], found["arm"], found["size"]) == (cells[0].id, cells[0].arm, "toy")
    assert later["id"] == cells[1].id, "the order is the study's"


def test_a_base_may_have_steps_of_its_own() -> None:
    """They are the cells' alone: the base stays the same, and so do its cells of other tasks."""
    study = load_study("frontier")
    sizes = study.sizes | {"5m": study.sizes["5m"].model_copy(update={"steps": {}})}
    plain = study.model_copy(update={"sizes": sizes})
    assert base_folder(study, "5m") == base_folder(plain, "5m")
    assert study.steps_of(study.sizes["5m"], "difference") < plain.steps_of(plain.sizes["5m"], "difference")
    ids = {cell.id for cell in cells_of(plain)}
    assert {(c.size, c.task) for c in cells_of(study) if c.id not in ids} == {("5m", "difference")}
    with pytest.raises(ValidationError, match="no task is called 'sum'"):
        Size.model_validate(study.sizes["5m"].model_dump() | {"steps": {"sum": 3}})
