"""The house stands: a room imports from its own floor or a lower one, never in a circle."""

import ast
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nslora_dist"
FLOORS = (
    "errors explain zero_file zero_knobs recipe recipe_adapter recipe_data recipe_file recipe_lm_eval recipe_train "
    "recipe_types yaml_file redact named dist watch clock logs meeting peers reasons guard quiet eigensolver "
    "null_space weight_null linear nf4 frozen adapter adapter_set null_lora artifacts folders machine manifests "
    "provenance merge_recipe triangle",
    "bad_rows json_rows column_rows rows heads batches samples data calibration_data base_files base_config base_model "
    "base_weights input_groups attach calibration supervised card export engines run_folder update_grams "
    "merging",
    "live_model live_grams live_calibration peft_start checkpoint checkpoint_files arm_job arm_stage arms export_arm "
    "trainer evaluate effects report lm_eval_bridge lm_eval_model lm_eval_tasks scoring plots dry_run plan tiny_world "
    "tiny_tasks pretrain budget merge_report",
    "pipeline command merge evaluate_adapter study recipe_page",
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
LONGEST = 360
"""Lines; a room is meant to stay under about 300, past which it has two jobs."""
# Packages that few rooms may import, so that their peculiarities have one place.
ALONE = {
    "deepspeed": {"engines/zero3.py"},
    "bitsandbytes": {"nf4.py"},
    "peft": {"export.py", "study/peers.py"},  # what is exported to PEFT, and what is compared with it
    "lm_eval": {"lm_eval_bridge.py", "lm_eval_model.py", "lm_eval_tasks.py"},
}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def imported(path: Path) -> tuple[str, ...]:
    """Full names of the modules that a file imports, at its top or inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full"
            base = node.module or ""
            # "from nslora_dist import dist" imports a module, "from nslora_dist.dist import rank" a name in one
            inside = [f"{base}.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
            names += inside if base.count(".") == 0 else [base]
    return tuple(names)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def edges() -> Iterator[tuple[Path, str, str]]:
    for path in files():
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "nslora_dist" and len(parts) > 1 and parts[1] != room(path):
                yield path, room(path), parts[1]


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in files()} - {"__init__"} <= FLOOR.keys()


def test_nobody_imports_upwards() -> None:
    upwards = [f"{path.relative_to(ROOT)} imports {to}" for path, at, to in edges() if FLOOR[to] > FLOOR.get(at, 9)]
    assert not upwards


def test_no_rooms_import_each_other_in_a_circle() -> None:
    reached: dict[str, set[str]] = {}
    for _, at, to in edges():
        reached.setdefault(at, set()).add(to)
    for middle in list(reached):
        for at in reached:
            if middle in reached[at]:
                reached[at] |= reached[middle]
    assert not [at for at in reached if at in reached[at]]


@pytest.mark.parametrize(("package", "rooms"), ALONE.items())
def test_some_packages_have_one_door(package: str, rooms: set[str]) -> None:
    users = {str(path.relative_to(PACKAGE)) for path in files() if package in {n.split(".")[0] for n in imported(path)}}
    assert users == rooms


def test_engines_never_import_each_other() -> None:
    engines = {"single", "fsdp2", "zero3"}
    for name in engines:
        found = {part for n in imported(PACKAGE / "engines" / f"{name}.py") for part in n.split(".")[2:3]}
        assert not found & (engines - {name})


def test_nothing_imports_the_entry_points_or_the_tests() -> None:
    for path in files():
        assert not {name.split(".")[0] for name in imported(path)} & {"launch", "tests", "helpers", "benchmarks"}


def test_entry_points_stay_thin() -> None:
    for path in sorted((ROOT / "launch").glob("*.py")):
        assert len(path.read_text().splitlines()) <= 50, path


def test_no_room_grows_out_of_hand() -> None:
    assert not {str(p.relative_to(ROOT)): n for p in files() if (n := len(p.read_text().splitlines())) > LONGEST}


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    """pytest leaves folders called dist and build out unless it is told not to, and says nothing of it."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(folders) >= 5
    assert [str(f) for f in folders if any(fnmatch(part, p) for part in f.parts for p in patterns)] == []
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert not {"dist", "build"} & set(tools["ruff"]["exclude"])
