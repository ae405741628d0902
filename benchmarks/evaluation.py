"""Evaluation of a sharded model: weights that stay gathered against weights that every pass gathers.

    python benchmarks/evaluation.py [--json PATH] [--quick] [--engines fsdp2 zero3]

Two processes of one machine over gloo, float32. Timed in turn inside one run: a token that the model writes for a batch
(`scoring.continuations`, a pass over the prompts included), and a pass over a batch of questions (`exact_match`), with
`Engine.whole` and with no room for it. `token_kept_over_gathered_...` and `pass_kept_over_gathered_...` are ratios of
medians; on a GPU's links they depend on size and width alone, which `launch/plan.py` reckons with.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import parser, write_result
from _models import alternate, llama_config, random_job, recipe_tree, show, token_batches, write_checkpoint
from _ranks import watched_ranks

RANKS = 2


def evaluate(folder: str, settings: dict[str, Any], engine: str) -> Iterator[Any]:
    """One rank's seconds: (a token kept, gathered, a pass kept, gathered)."""
    from nslora_dist import machine
    from nslora_dist.engines import start_engine
    from nslora_dist.evaluate import exact_match
    from nslora_dist.recipe import Recipe
    from nslora_dist.scoring import continuations

    recipe = Recipe.model_validate(recipe_tree(folder, rank=16, engine=engine, batch=1, ranks=RANKS))
    rows, length, here = settings["rows"], settings["length"], torch.device("cpu")
    questions = token_batches(settings["passes"], rows=rows, length=length, vocabulary=settings["vocabulary"])
    prompts = [row.tolist() for _ in range(RANKS) for row in questions[0].input_ids]
    asked: dict[str, Any] = {"batch_size": rows, "pad": 0, "device": here, "name": "answers"}
    yield
    started = start_engine(random_job(recipe), recipe)

    def write() -> None:
        continuations(started, prompts, ends=lambda new: False, most=settings["tokens"], **asked)

    def ask() -> None:
        exact_match(started, questions, device=here)

    def within(room: float, work: Any) -> Any:
        def run() -> None:
            machine.ROOM = room
            with started.whole():
                work()

        return run

    found = alternate(
        {
            "token_kept": within(1.0, write),
            "token_gathered": within(0.0, write),
            "pass_kept": within(1.0, ask),
            "pass_gathered": within(0.0, ask),
        },
        settings["repeats"],
    )
    units = {"token": settings["tokens"], "pass": settings["passes"]}
    yield {name: wall / units[name.partition("_")[0]] for name, (wall, _) in found.items()}


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--quick", action="store_true", help="a toy size")
    cli.add_argument("--hidden", type=int, default=1024)
    cli.add_argument("--intermediate", type=int, default=2816)
    cli.add_argument("--layers", type=int, default=8)
    cli.add_argument("--vocabulary", type=int, default=4096)
    cli.add_argument("--rows", type=int, default=4, help="of a batch, a rank")
    cli.add_argument("--length", type=int, default=32, help="tokens of a row")
    cli.add_argument("--tokens", type=int, default=16, help="written")
    cli.add_argument("--passes", type=int, default=8, help="batches of questions")
    cli.add_argument("--repeats", type=int, default=3)
    cli.add_argument("--engines", nargs="+", choices=["fsdp2", "zero3"], default=["fsdp2", "zero3"])
    args = cli.parse_args()
    if args.quick:
        args.hidden, args.intermediate, args.layers, args.vocabulary = 128, 256, 2, 128
        args.length, args.tokens, args.passes, args.repeats = 8, 3, 2, 1
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    figures: dict[str, Any] = {}
    config = llama_config(
        hidden=args.hidden, intermediate=args.intermediate, layers=args.layers, vocabulary=args.vocabulary
    )
    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
        figures["parameters"] = write_checkpoint(Path(folder), config, torch.float32)
        for engine in args.engines:
            ranks = watched_ranks(evaluate, RANKS, folder, settings, engine, threads=args.threads or 1)
            slowest = {name: max(rank.result[name] for rank in ranks) for name in ranks[0].result}
            new: dict[str, Any] = {f"seconds_{name}_{engine}": round(value, 5) for name, value in slowest.items()}
            for unit in ("token", "pass"):
                ratio = slowest[f"{unit}_kept"] / slowest[f"{unit}_gathered"]
                new[f"{unit}_kept_over_gathered_{engine}"] = round(ratio, 3)
            show(new)
            figures |= new
            write_result(args.json, figures, settings)


if __name__ == "__main__":
    main()
