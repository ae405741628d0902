"""What every benchmark shares: timing by medians, a description of the machine, one JSON layout."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

# `python benchmarks/NAME.py` puts benchmarks/ on the path, not the repository: needed where nothing is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def median_seconds(fn: Callable[[], object], repeats: int = 3) -> float:
    """Median wall time of `repeats` calls in seconds; waits for CUDA before and after each call.

    Args:
        fn: What to time; its result is dropped.
        repeats: Number of calls, at least 1. There is no warm-up: call `fn` once before where one is wanted.
    """
    return median_wall_and_cpu(fn, repeats)[0]


def median_wall_and_cpu(fn: Callable[[], object], repeats: int = 3) -> tuple[float, float]:
    """Medians of wall time and of this process's processor time (summed over threads), in seconds.

    With one thread and no accelerator, processor time is the fairer one on a machine shared with other work.
    """
    wall, cpu = [], []
    for _ in range(repeats):
        _synchronize()
        start, start_cpu = time.perf_counter(), time.process_time()
        fn()
        _synchronize()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return statistics.median(wall), statistics.median(cpu)


def machine() -> dict[str, Any]:
    """Hardware and library versions that a figure depends on; no host, user or path names."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def write_result(path: str | Path | None, figures: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Writes {"figures", "settings", "machine"} as JSON through a temporary file; does nothing for path None.

    Args:
        path: Target file; its folder is made if need be.
        figures: Name to number (or text where a figure is a choice made).
        settings: What was run: sizes, seeds, repeats.
    """
    if path is None:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {"figures": dict(figures), "settings": dict(settings), "machine": machine()}
    fresh = target.with_name(target.name + ".tmp")
    fresh.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    fresh.replace(target)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the options all benchmarks have: --json and --threads."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", metavar="PATH", help="write the figures here as well")
    made.add_argument("--threads", type=int, metavar="N", help="threads of the CPU kernels (default: torch's choice)")
    return made


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
