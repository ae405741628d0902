"""The report says what was measured, "–" what was not, and never fails for want of a value."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nslora_dist import dist
from nslora_dist import plots as plots_module
from nslora_dist.report import Scalars, spectrum_entry, summary_table, write_report, written_paths

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
PNG = b"\x89PNG\r\n\x1a\n"


def interference(level: float) -> dict[str, Any]:
    modules = {f"model.layers.{layer}.{kind}": level * (1 + layer) for layer in range(2) for kind in KINDS}
    return {
        "max": 2 * level,
        "mean": 1.5 * level,
        "per_module": modules,
        "by_source": {"facts": {"max": 2 * level, "mean": level}},
        "by_probe": {"prose": {"max": 4 * level, "mean": None}},
    }


@pytest.fixture
def full() -> dict[str, Any]:
    spectra = {
        f"model.layers.{layer}.{kind}": spectrum_entry(torch.logspace(-8, 0, 64), 4)
        for layer in range(2)
        for kind in KINDS
    }
    return {
        "recipe": {"name": "tiny_math", "adapter": {"method": "lora_null"}, "base_model": {"path": "tiny"}},
        "engine": "zero3",
        "world_size": 2,
        "quantization": "none",
        "losses": [3.0 / (1 + step) for step in range(30)],
        "evaluation": {
            "lora": {"adaptation": 1.0, "retention": 0.6, "retention_by": {"facts": 0.84, "sum": 0.4}},
            "base": {"adaptation": 0.0, "retention": 1.0, "retention_by": {"facts": 1.0, "sum": 1.0}},
            "null_space": {
                "adaptation": 0.99,
                "retention": 0.98,
                "retention_by": {"facts": 0.985, "sum": None},
                "learning_rate": 0.02,
            },
        },
        "interference": interference(0.05),
        "interference_by_arm": {"lora": interference(0.5), "null_space": interference(0.05)},
        "leak": {"calibration": 1e-4, "heldout": 2e-4, "random": 0.0625},
        "seconds": {"calibration": 12.0, "training": 60.0},
        "tokens_per_second": 8123.4,
        "peak_memory_bytes": 2**30,
        "peak_memory_by_phase": {"training": 2**29},
        "adapter": Path("runs/tiny_math/adapter"),
        "data": {"rows": 4000, "truncated_rows": 3},
        "spectra": spectra,
    }


def plots(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "plots").iterdir())


def test_everything_is_written(tmp_path: Path, full: dict[str, Any]) -> None:
    before = copy.deepcopy(full)
    write_report(tmp_path / "run", full)
    run = tmp_path / "run"
    assert plots(run) == ["frontier.png", "interference.png", "loss.png", "spectrum.png"]
    assert all((run / "plots" / name).read_bytes().startswith(PNG) for name in plots(run))
    back = json.loads((run / "report.json").read_text())
    assert back.keys() == full.keys()
    assert back["losses"] == full["losses"] and back["adapter"] == "runs/tiny_math/adapter"
    text = (run / "report.md").read_text()
    for expected in (
        "# tiny_math",
        "| null-space adapter | 99.0% | 98.0% | 98.5% | – | 0.0791 | 0.1 | 0.02 |",
        "keeps 98.0% of the base's retention and reaches 99.0% of plain LoRA's task accuracy",
        "| prose | 0.2 | – |",
        "| 0.0001 | 0.0002 | 0.0625 |",
        "| peak memory a rank | 1.00 GiB |",
        "| peak memory, training | 0.50 GiB |",
        "| data, truncated rows | 3 |",
        "| loss, first and last | 3.0000 → 0.1000 |",
    ):
        assert expected in text
    for name in plots(run):
        assert text.count(f"(plots/{name})") == 1
    assert full == before


def test_an_empty_report_is_still_a_report(tmp_path: Path) -> None:
    write_report(tmp_path, {})
    assert json.loads((tmp_path / "report.json").read_text()) == {}
    assert plots(tmp_path) == []
    assert "None" not in (tmp_path / "report.md").read_text()
    assert summary_table({}) == "no arm was evaluated"


def test_missing_parts_leave_no_traces(tmp_path: Path, full: dict[str, Any]) -> None:
    write_report(tmp_path, full)
    for key in full:
        full[key] = None
    full["losses"] = [math.nan, 2.0, math.inf]
    full["evaluation"] = {"base": {"adaptation": None, "retention": math.nan, "retention_by": {}}}
    full["spectra"] = {"model.layers.0.mlp.up_proj": {"eigenvalues": [0.0, -1.0], "rank": 1}}
    write_report(tmp_path, full)
    assert plots(tmp_path) == ["loss.png"]
    back = json.loads((tmp_path / "report.json").read_text())
    assert back["losses"] == [None, 2.0, None]
    assert back["evaluation"]["base"]["retention"] is None
    text = (tmp_path / "report.md").read_text()
    assert "| base | – | – |" in text and "None" not in text and "nan" not in text and "spectrum.png" not in text


def test_json_holds_no_foreign_types(tmp_path: Path) -> None:
    values = {
        "a": torch.tensor([1.0, math.nan]),
        "b": np.float32(0.5),
        "c": np.float64("inf"),
        "d": (1, True, None, "x"),
        3: torch.tensor(2),
        "e": np.arange(2),
    }
    write_report(tmp_path, {"data": values})
    want = {"a": [1.0, None], "b": 0.5, "c": None, "d": [1, True, None, "x"], "3": 2, "e": [0, 1]}
    assert json.loads((tmp_path / "report.json").read_text())["data"] == want


def test_summary_table_is_aligned(full: dict[str, Any]) -> None:
    lines = summary_table(full).splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["base", "plain", "null-space"]
    assert lines[3].split()[1:] == ["0.0%", "100.0%", "100.0%", "100.0%", "–", "–", "–"]
    assert lines[5].split()[2:] == ["99.0%", "98.0%", "98.5%", "–", "0.0791", "0.1", "0.02"]
    assert len({len(line) for line in lines[1:6]}) == 1
    assert lines[-1].startswith("The null-space adapter keeps 98.0%")


def test_columns_that_nobody_has_are_left_out(full: dict[str, Any]) -> None:
    only = {"evaluation": {"base": {"adaptation": 0.5, "retention": 0.5, "retention_by": {}}}}
    assert summary_table(only).splitlines()[-1].split() == ["base", "50.0%", "50.0%"]
    del full["interference_by_arm"]
    rows = summary_table(full).splitlines()
    assert rows[4].split()[-3:] == ["–", "–", "–"] and rows[5].split()[-3:] == ["0.0791", "0.1", "0.02"]


def test_a_plain_lora_run_is_compared_with_the_base_alone(full: dict[str, Any]) -> None:
    full["recipe"]["adapter"]["method"] = "lora"
    del full["evaluation"]["null_space"]
    assert summary_table(full).splitlines()[-1] == "The plain LoRA keeps 60.0% of the base's retention."


@pytest.mark.parametrize("arms", [1, 12])
def test_any_number_of_arms_can_be_drawn(tmp_path: Path, full: dict[str, Any], arms: int) -> None:
    full = {
        "evaluation": {f"arm_{i}": {"adaptation": 1.0, "retention": 1.0 - 1e-3 * i} for i in range(arms)},
        "interference_by_arm": {f"arm_{i}": interference(0.0 if arms == 1 else 0.1) for i in range(arms)},
    }
    write_report(tmp_path, full)
    assert plots(tmp_path) == ["frontier.png", "interference.png"]


def test_labels_of_the_frontier_do_not_overlap(full: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for i in range(5):
        full["evaluation"][f"arm_{i}"] = {"adaptation": 0.99, "retention": 0.97 - 0.02 * i}
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    assert plots_module._frontier(figure, full)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 8
    for i, box in enumerate(boxes):
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("size", [1, 64, 256, 28672])
def test_spectrum_entry_keeps_both_ends(size: int) -> None:
    eigenvalues = torch.arange(1, size + 1, dtype=torch.float32)
    entry = spectrum_entry(eigenvalues, 1)
    assert len(entry["index"]) == len(entry["eigenvalues"]) <= 256
    assert entry["eigenvalues"] == [float(i) for i in entry["index"]]
    assert (entry["index"][0], entry["index"][-1], entry["size"]) == (1, size, size)


def test_written_paths_names_only_what_is_there(tmp_path: Path) -> None:
    assert written_paths(tmp_path) == ""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "report.md").write_text("x")
    lines = written_paths(tmp_path).splitlines()
    assert [line.split() for line in lines] == [
        ["adapter", str(tmp_path / "adapter")],
        ["report", str(tmp_path / "report.md")],
    ]


def test_scalars_can_be_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Scalars(tmp_path) as scalars:
        scalars.add(1, {"train/loss": 2.0, "train/grad_norm": None})
        scalars.add(2, {"train/loss": torch.tensor(1.5)})
    scalars.close()
    scalars.add(3, {"train/loss": 1.0})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.5)]


def test_the_budget_is_reported_where_there_was_one(tmp_path: Path, full: dict[str, Any]) -> None:
    write_report(tmp_path / "free", full)
    assert "budget" not in (tmp_path / "free" / "report.md").read_text()
    full["interference"]["budget"] = {"limit": 0.05, "over": "total", "final": 0.0432}
    write_report(tmp_path / "bound", full)
    text = (tmp_path / "bound" / "report.md").read_text()
    assert "budget of 0.05 for the root mean square over modules" in text and "at the end that is 0.0432" in text
    assert json.loads((tmp_path / "bound" / "report.json").read_text())["interference"] == full["interference"]


def test_other_ranks_write_no_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "rank", lambda: 1)
    scalars = Scalars(tmp_path / "tensorboard")
    scalars.add(1, {"loss": 1.0})
    scalars.close()
    assert not (tmp_path / "tensorboard").exists()


def test_null_spaces_of_weights_have_a_table(tmp_path: Path, full: dict[str, Any]) -> None:
    entry = {"rank": 8, "right": {"kept": 16}, "left": {"kept": 12}}
    facts = {"threshold": 0.1, "dim": 16, "left_out": [], "modules": {"model.layers.0.q_proj": entry}}
    full["weight_null_space"] = {"null_lora": facts}
    write_report(tmp_path / "run", full)
    text = (tmp_path / "run" / "report.md").read_text()
    assert "## Null space of the weights, Null-LoRA" in text and "| q_proj | 1 | 16 | 12 | 8 |" in text
    assert "Left out" not in text
