"""Calibrate, train, export and evaluate one recipe.

deepspeed launch/train.py --recipe llama3_70b_math
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without being installed

from nslora_dist.command import run
from nslora_dist.pipeline import run_training

if __name__ == "__main__":
    sys.exit(run("Calibrate, train, export and evaluate one recipe.", run_training))
