"""What tests of the launch scripts share: the environment of a launch, and how one ended."""

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 400.0
"""Seconds after which a launch counts as hanging; each takes about 20 on two idle cores."""


@dataclass(frozen=True)
class Ended:
    """A finished launch."""

    status: int
    output: str
    errors: str

    def one_line_error(self) -> str:
        """What follows ``error:``, said once and by one rank, without a traceback of ours."""
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.errors
        return lines[0].removeprefix("error: ")


@dataclass(frozen=True)
class World:
    """Paths of a toy world; ``recipe`` is a single-process job of six steps with one baseline."""

    folder: Path
    recipe: Path

    def rows(self, name: str, text: str) -> str:
        """Writes a file of rows and gives its path."""
        path = self.folder / name
        path.write_text(text)
        return str(path)


def environment(**more: str) -> dict[str, str]:
    """The test's own environment, offline and on the CPU, with this interpreter's scripts first on PATH."""
    quiet = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return kept | quiet | more


def free_port() -> str:
    """A port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
