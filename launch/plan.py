"""Memory, traffic and time of one recipe on a cluster, on paper: nothing is loaded and no GPU is needed.

python launch/plan.py --recipe llama3_70b_math --gpus 8 --gpu-memory 80GB --interconnect 400Gb/s
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without being installed

from nslora_dist.plan.main import main

if __name__ == "__main__":
    sys.exit(main())
