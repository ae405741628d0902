"""Makes the demo's base and data again: `python launch/pretrain_tiny.py` (8 to 15 minutes on two cores)."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from nslora_dist import pretrain, tiny_world


def main() -> None:
    """Reads the arguments, trains, saves, and reports what the saved base recalls."""
    defaults = pretrain.PretrainSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "recipes" / "tiny", help="gets base/ and data/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=704)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    world = tiny_world.make_world(args.seed, people=args.people)
    tokenizer = tiny_world.make_tokenizer(world)
    sizes = {"hidden_size": args.hidden_size, "intermediate_size": args.intermediate_size, "layers": args.layers}
    model = pretrain.build_model(tokenizer, **sizes, seed=args.seed)
    settings = pretrain.PretrainSettings(steps=args.steps, learning_rate=args.learning_rate, seed=args.seed)
    pretrain.pretrain(model, tokenizer, world.pretraining, settings)
    saved = pretrain.save_base(model, tokenizer, args.output / "base")
    tiny_world.write_data(world, args.output / "data")
    for kind, rows in world.retention.items():
        print(f"{kind}: {pretrain.greedy_exact_match(saved, tokenizer, rows):.3f} of {len(rows)} rows recalled exactly")


if __name__ == "__main__":
    main()
