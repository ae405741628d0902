"""Merge LoRA adapters of one base into one adapter, or into a full model.

python launch/merge.py --recipe merge_tiny
torchrun --nproc-per-node 8 launch/merge.py --recipe my_merge.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without being installed

from nslora_dist.command import run
from nslora_dist.merge import run_merge
from nslora_dist.merge_recipe import load_merge_recipe
from nslora_dist.merge_report import describe_merge

if __name__ == "__main__":
    said = "Merge LoRA adapters of one base into one adapter, or into a full model."
    sys.exit(run(said, run_merge, load=load_merge_recipe, explain=describe_merge))
