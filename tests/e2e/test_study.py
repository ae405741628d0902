"""``launch/study.py --quick``: stopped, killed and resumed, no cell done twice, every figure from the lines."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.launching import ROOT, TIMEOUT, environment
from nslora_dist.study.main import main

CELLS = 11


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "launch/study.py", "--quick", "--output", str(folder), "--processes", "1", *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return process.returncode, said


def here(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> tuple[int, str]:
    """The same command in this process, which has PyTorch already."""
    capsys.readouterr()
    status = main(["--quick", "--output", str(folder), "--processes", "1", *more])
    said = capsys.readouterr()
    return status, said.out + said.err


def whole_lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "cells.jsonl"
    texts = path.read_text().split("\n") if path.is_file() else []
    return [json.loads(text) for text in texts if text.endswith("}")]


def wait_for(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    end = time.monotonic() + TIMEOUT
    while len(whole_lines(folder)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"no {count} cells after {TIMEOUT:.0f} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick study that was asked to stop, then killed with a line cut off, and then came to its end."""
    folder = tmp_path_factory.mktemp("study")
    process = start(folder)
    wait_for(folder, process, 2)
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    stopped = len(whole_lines(folder))
    assert status == 75 and "the same command continues" in said
    assert 2 <= stopped < CELLS
    process = start(folder)
    wait_for(folder, process, stopped + 2)
    process.send_signal(signal.SIGKILL)
    finish(process)
    with (folder / "cells.jsonl").open("a") as file:
        file.write('{"id": "torn", "adaptation": 0.')
    status, said = finish(start(folder))
    assert status == 0, said
    assert "1 lines could not be read" in said
    return folder


def test_no_cell_is_done_twice_and_none_is_missing(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = Counter(line["id"] for line in whole_lines(done))
    assert len(times) == CELLS and set(times.values()) == {1}
    status, said = here(capsys, done)
    assert status == 0 and "cells to do" not in said  # all are there: nothing is begun
    assert len(whole_lines(done)) == CELLS


def test_a_dry_run_lists_what_is_missing(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"0 of {CELLS} cells are missing" in here(capsys, done, "--dry-run")[1]
    said = here(capsys, tmp_path / "new", "--dry-run", "--arm", "pissa")[1]
    assert "2 of 2 cells are missing" in said and said.count(" pissa ") == 2
    assert not (tmp_path / "new").exists()
    status, said = here(capsys, done, "--confirm")
    assert status == 2 and "--confirm: no arm among these has all its settings with one seed and a seed left" in said


def test_a_line_has_what_was_measured(done: Path) -> None:
    lines = whole_lines(done)
    assert {line["method"] for line in lines} == {"lora", "lora_null", "pissa"}
    for line in lines:
        assert line["trained_parameters"] == {"lora": 8192, "lora_null": 8192, "pissa": 8192}[line["method"]]
        assert line["retention"] == pytest.approx(np.mean(list(line["retention_by"].values())), abs=1e-5)
        found = line["interference"]
        assert set(found["probes"]) == set(line["retention_by"])
        assert len(found["calibration"]["by_depth"]) == 2
        assert found["calibration"]["max"] >= found["calibration"]["rms"] >= found["calibration"]["mean"] > 0
    most = max(lines, key=lambda line: line["adaptation"])
    assert most["adaptation"] > most["base"]["adaptation"]  # something is learned, so that a summary has a frontier
    # The null space does what it is for, on the texts that it was calibrated on.
    same = {(x["method"], x["learning_rate"]): x for x in lines if x["calibration"] == "all" and not x["weight_decay"]}
    ours, plain = (same[key]["interference"]["calibration"]["rms"] for key in (("lora_null", 0.003), ("lora", 0.001)))
    assert ours < plain


def test_a_gpu_that_is_not_there(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, said = here(capsys, done, "--device", "cuda")
    assert status == 2 and "--device cuda: PyTorch sees no CUDA GPU here" in said


def slow_ranks(values: list[float]) -> np.ndarray:
    return np.array([sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values])


def assert_frontier(own: dict[str, Any], mine: list[dict[str, Any]], best: float) -> None:
    """Area and retention at a share of the best, computed from the lines by going over every pair."""
    dots = [(x["adaptation"], x["retention"] / x["base"]["retention"]) for x in mine]
    dots.append((mine[0]["base"]["adaptation"], 1.0))
    steps = sorted({0.0, *(a for a, _ in dots)})
    area = sum((b - a) * max(r for x, r in dots if x >= b - 1e-9) for a, b in zip(steps, steps[1:], strict=False))
    assert own["area"]["value"] == pytest.approx(area, abs=1e-5)
    for share in (0.95, 0.99):
        reached = [r for a, r in dots[:-1] if a >= share * best - 1e-9]
        expected = pytest.approx(max(reached), abs=1e-5) if reached else None
        assert own["retention_at"][f"{share:g}"]["value"] == expected


def test_every_figure_of_the_summary_comes_from_the_lines(done: Path) -> None:
    lines, found = whole_lines(done), json.loads((done / "summary.json").read_text())
    text = (done / "summary.md").read_text()
    methods = [line for line in lines if line["budget"] is None]  # the dial's grid is no comparison of methods
    best = max(line["adaptation"] for line in methods)
    assert found["cells"] == len(lines)
    for setting in found["settings"]:
        here = [x for x in methods if x["calibration"] == setting["calibration"] or x["arm"] != "delta"]
        assert setting["best_adaptation"] == pytest.approx(best)
        assert set(setting["variants"]) == {f"{x['arm']}, wd {x['weight_decay']:g}" for x in here}
        for name, own in setting["variants"].items():
            mine = [x for x in here if f"{x['arm']}, wd {x['weight_decay']:g}" == name]
            assert_frontier(own, mine, best)
            section = text.split(f"calibrated on {setting['calibration']}\n")[1].splitlines()
            row = next(r for r in section if name in r)
            assert f"{own['area']['value']:.3f}" in row and f"{own['seconds']:.1f}" in row
            assert own["seconds"] == pytest.approx(np.mean([x["seconds"] for x in mine]), rel=1e-4)
        for name, own in setting["arms"].items():
            mine = [x for x in here if x["arm"] == name]
            assert own["settings"] == len(mine)
            assert_frontier(own, mine, best)
            row = next(r for r in section if name in r and f"{own['trained_parameters']:,}" in r)
            assert f"{own['area']['value']:.3f}" in row
    whole = [x for x in lines if x["calibration"] == "all"]
    assert found["prediction"]["cells"] == len(whole) == 9
    for name, aggregate in found["prediction"]["aggregates"].items():
        x = slow_ranks([line["interference"]["calibration"][name] for line in whole])
        y = slow_ranks([round(line["base"]["retention"] - line["retention"], 9) for line in whole])
        expected = float(np.corrcoef(x, y)[0, 1])
        assert aggregate["across"]["value"] == pytest.approx(expected, abs=2e-5)
        assert f"| {name.replace('_', ' ')} | {aggregate['across']['value']:.3f}" in text
    for piece, own in found["prediction"]["probes"]["by_piece"].items():
        value = own["spearman"]["value"]
        row = next(row for row in text.split("Probe by probe")[1].splitlines() if row.startswith(f"| {piece} |"))
        assert (f"{value:.3f}" if value is not None else "–") in row
    (curve,) = found["curves"]
    held = next(line for line in lines if line["budget"] is not None)
    free = next(x for x in whole if x["arm"] == "delta" and x["learning_rate"] == 0.03 and not x["weight_decay"])
    assert [point["value"] for point in curve["points"]] == [held["budget"], None]
    for point, line in zip(curve["points"], (held, free), strict=True):
        assert point["adaptation"] == pytest.approx(line["adaptation"], abs=1e-5)
        assert point["retention_by"] == pytest.approx(line["retention_by"], abs=1e-5)
    against = curve["monotone"]["retention"]
    kept = [line["retention"] / line["base"]["retention"] for line in (held, free)]
    assert against == pytest.approx(max(0.0, kept[1] - kept[0]), abs=1e-5)
    assert (
        held["interference"]["calibration"]["rms"]
        <= held["budget"] * 1.001
        < free["interference"]["calibration"]["rms"]
    )
    for line in lines:  # as many sequences of a source as a calibration has are not few
        assert set(line["interference"]["few"]) == {"4", "16"}
    plots = re.findall(r"\]\((plots/[^)]+)\)", text)
    assert len(plots) == 8 and all((done / plot).stat().st_size > 5000 for plot in plots)


def test_the_summary_follows_the_lines(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = [line | {"adaptation": 0.75} if line["method"] == "pissa" else line for line in whole_lines(done)]
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed[:-1]))
    status, said = here(capsys, tmp_path, "--summary")
    assert status == 0, said
    text = (tmp_path / "summary.md").read_text()
    assert "Best adaptation of any arm: 0.750" in text
    assert "1 cells are missing" in text


def test_time_may_be_over_before_the_first_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = here(capsys, tmp_path, "--minutes", "0.0001")
    assert status == 0 and f"{CELLS} cells are left; the same command continues" in said
    assert here(capsys, tmp_path, "--summary")[0] == 2  # asked for by name, that is an error


def test_lines_of_another_base_are_not_added_to(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same settings give other weights on another processor: their cells are no seeds of one study."""
    shutil.copytree(done / "bases", tmp_path / "bases")
    lines = whole_lines(done)
    kept = [line | {"base_hash": "0123456789abcdef"} for line in lines[:-1]]
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    status, said = here(capsys, tmp_path)
    assert status == 1 and "are of the base 0123456789abcdef" in said and lines[0]["base_hash"] in said
    assert len(whole_lines(tmp_path)) == CELLS - 1


def test_two_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = start(tmp_path / "one")
    end = time.monotonic() + TIMEOUT
    while not (tmp_path / "one" / "study.json").exists():
        assert time.monotonic() < end and first.poll() is None
        time.sleep(0.05)
    status, said = here(capsys, tmp_path / "one")
    first.terminate()
    assert status == 2 and "another process works on this study" in said
    assert finish(first)[0] == 75
