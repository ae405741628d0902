"""Evaluate LoRA adapters, this project's or anybody's, on a recipe's base: one table, one JSON file.

python launch/evaluate.py --recipe tiny_math engine.name=single --adapter runs/tiny_math/adapter
deepspeed launch/evaluate.py --recipe llama3_70b_math --adapter ours=runs/llama3_70b_math/adapter --adapter other=folder
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without being installed

from nslora_dist.command import run
from nslora_dist.evaluate_adapter import run_evaluation


def flags(parser: ArgumentParser) -> None:
    """What to evaluate, and where the figures go."""
    said = "a PEFT LoRA folder on the recipe's base; give it again for several"
    parser.add_argument("--adapter", action="append", required=True, metavar="[NAME=]FOLDER", help=said)
    parser.add_argument("--output", default="evaluation.json", metavar="PATH", help="a new file (%(default)s)")


if __name__ == "__main__":
    sys.exit(run("Evaluate LoRA adapters on a recipe's base.", run_evaluation, flags=flags))
