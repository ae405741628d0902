"""Makes ``tests/helpers`` importable here."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(path) for path in (Path(__file__).parents[1], Path(__file__).parents[2])]


def pytest_configure(config: pytest.Config) -> None:
    """Declares the marker of tests that need a GPU."""
    config.addinivalue_line("markers", "gpu: needs CUDA")
