"""The study: every method, many learning rates and seeds, on small bases made for it.

python launch/study.py --study frontier --dry-run
python launch/study.py --study frontier
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without being installed

from nslora_dist.study.main import main

if __name__ == "__main__":
    sys.exit(main())
