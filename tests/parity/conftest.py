"""Runs every engine once through the cases that the tests here look at."""

from pathlib import Path
from typing import Any

import pytest

from helpers import parity_run
from helpers.ranks import run_ranks


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases and texts."""
    return parity_run.prepare(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="session")
def found(world: Path) -> dict[str, dict[str, Any]]:
    """engine → case → what it found, as rank 0 saw it; the ranks agreed on every loss.

    Files that use it are named in ``tests/conftest.py``, so that one process runs them.
    """
    results = {}
    for engine, ranks in parity_run.ENGINES.items():
        first, *others = run_ranks(parity_run.run_engine, ranks, engine, world, timeout=900)
        for other in others:
            assert other == {name: case.losses for name, case in first.items()}
        results[engine] = first
    return results
