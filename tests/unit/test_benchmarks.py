"""Every benchmark runs in its toy size and writes the figures it promises; no figure is judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Name → options of its own toy size, and figures that must be there.
TOYS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "calibration": (
        ["--dtypes", "float32"],
        ("calibration_over_forward", "calibration_with_solve_over_forward", "seconds_forward_float32"),
    ),
    "train_step": (
        ["--cases", "float32", "nf4"],
        ("tokens_per_second_over_peft_r16", "saved_memory_over_peft_r16", "step_over_adapter_free_r16"),
    ),
    "loading": (
        ["--engines", "fsdp2", "--cases", "nf4"],
        ("bytes_load_bound_nf4_fsdp2", "load_peak_over_bound_nf4", "load_peak_over_model_nf4"),
    ),
    "budget": ([], ("budget_share_of_step_bound", "budget_share_of_step_free", "tokens_for_one_percent_bound")),
    "scaling": (["--ranks", "1"], ("calibration_memory_depth_ratio", "seconds_step_1ranks_2blocks")),
    "evaluation": (["--engines", "fsdp2"], ("token_kept_over_gathered_fsdp2", "pass_kept_over_gathered_fsdp2")),
    "checkpoint": ([], ("seconds_training_waits", "wait_over_whole", "seconds_to_take_it_up")),
    "merging": ([], ("saved_memory_over_dense_k2_r4", "step_time_over_dense_k2_r8", "bytes_updates_growth_factored")),
    "merging_tasks": ([], ("retention_lora_arithmetic_0.5", "retention_shared_a_gram", "rms_interference_lora_ties_1")),
    "gpu": (
        ["--case", "llama3_70b_nf4"],
        ("seconds_calibration_llama3_70b_nf4", "share_of_matrix_rate_step_llama3_70b_nf4"),
    ),
}


@pytest.mark.parametrize("name", TOYS)
def test_toy_size_gives_the_figures(name: str, tmp_path: Path) -> None:
    options, promised = TOYS[name]
    target = tmp_path / "figures.json"
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--threads", "1", "--json", str(target), *options]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    written: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    assert written.keys() == {"figures", "settings", "machine"}
    for figure in promised:
        assert written["figures"][figure] > 0, figure
        assert figure in done.stdout
