"""Calibrate one recipe: write null_space/ and stop.

torchrun --nproc-per-node 8 launch/calibrate.py --recipe llama3_70b_math
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without being installed

from nslora_dist.command import run
from nslora_dist.pipeline import run_calibration

if __name__ == "__main__":
    sys.exit(run("Calibrate one recipe: write null_space/ and stop.", run_calibration))
