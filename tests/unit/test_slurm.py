"""``launch/slurm.sbatch`` with SLURM's commands stood in for: what it asks of them."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"


def test_its_log_goes_into_a_folder_that_every_clone_has() -> None:
    (where,) = re.findall(r"^#SBATCH --output=(.*)$", SCRIPT.read_text(), re.MULTILINE)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    folder = str(Path(where).parent)
    assert folder == "." or any(name.startswith(f"{folder}/") for name in tracked.splitlines())


def test_each_task_gets_its_cpus_and_the_recipe(tmp_path: Path) -> None:
    """Since SLURM 22.05 srun does not take ``--cpus-per-task`` over from the job."""
    for name, body in {"srun": f'printf "%s\\n" "$@" > {tmp_path}/asked', "scontrol": "echo first"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "first,second",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "12",
    }
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = ["bash", str(SCRIPT), "tiny_math", "adapter.rank=4"]
    subprocess.run(command, env={**os.environ, **job, "PATH": path}, check=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    srun, torchrun = asked[: asked.index("torchrun")], asked[asked.index("torchrun") :]
    assert "--cpus-per-task=12" in srun
    assert torchrun[-4:] == ["launch/train.py", "--recipe", "tiny_math", "adapter.rank=4"]
    assert torchrun[torchrun.index("--rdzv-endpoint") + 1] == "first:29517"
