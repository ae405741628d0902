"""Three adapters of three tasks on the demo's base, merged by every method: what is left of each task, and of the base.

    python benchmarks/merging_tasks.py [--json PATH] [--quick] [--work FOLDER] [--tasks difference new_facts]

Tasks: differences, minima, and facts about new people (``nslora_dist/tiny_tasks.py``). Two kinds of adapters:

- lora: plain LoRA of rank 8;
- shared_a: LoRA-Null of rank 32, A frozen in the null space of one calibration (orthonormal, so A is the same).

Everything is done by the shipped scripts in processes of their own: ``launch/train.py`` once a task for both kinds,
``launch/merge.py`` once a merge, ``launch/evaluate.py`` once for all. Learning rates are the demo's, coefficients were
fixed before any merge was looked at: 1/K, 0.5 and 1 for arithmetic, 1 for the others, and nsc's own search from 0.4.
svd, ties and dare_ties are compressed to the rank of one adapter; ties and dare_ties keep a fifth of the entries.

Figures, accuracies in 0..1: ``task_<kind>_<merge>_<task>``; ``of_single_<kind>_<merge>``, the mean over tasks of the
merged adapter's accuracy over that task's own adapter's; ``retention_<kind>_<merge>`` over the base's three kinds of
knowledge; ``rms_interference_<kind>_<merge>`` on the calibration texts. <merge> is ``single_<task>`` for the adapters
themselves. With ``--work`` trainings and merges that lie there are taken up.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from _common import parser, write_result
from _models import show

from nslora_dist import tiny_tasks, tiny_world
from nslora_dist.card import markdown_table

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "recipes" / "tiny"
KINDS = {"lora": "baselines/lora", "shared_a": "adapter"}
RANKS = {"lora": 8, "shared_a": 32}
KEPT = ("facts", "sum", "maximum")
SIZE: dict[str, Any] = {"steps": 400, "batch": 32, "texts": 256, "asked": 600, "nsc_steps": 500, "nsc_inputs": 32}
ROWS = {"train_rows": 3000, "test_rows": 256, "people": 20}
QUICK: dict[str, Any] = {"steps": 3, "batch": 8, "texts": 16, "asked": 32, "nsc_steps": 2, "nsc_inputs": 4}
QUICK_ROWS = {"train_rows": 64, "test_rows": 16, "people": 2}


def launch(script: str, log: Path, *arguments: str) -> None:
    """Runs an entry point as a user does; its words go to ``log``."""
    command = [sys.executable, f"launch/{script}.py", *arguments]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=ROOT, env=os.environ, stdout=file, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{' '.join(command)}: status {done.returncode}\n{log.read_text()[-3000:]}"


def job(name: str, work: Path, size: dict[str, Any]) -> dict[str, Any]:
    """A task's recipe: the demo's, in one process, with its orthonormal A."""
    texts = {source: {"path": str(TINY / "data" / f"calibration_{source}.jsonl")} for source in ("facts", "arithmetic")}
    return {
        "name": name,
        "base_model": {"path": str(TINY / "base"), "dtype": "float32"},
        "calibration": {"sources": texts, "samples": size["texts"], "sequence_length": 64, "batch_size": 32},
        "adapter": {"method": "lora_null", "form": "delta", "rank": RANKS["shared_a"], "a_init": "orthonormal"},
        "data": {"path": str(work / "data" / f"{name}_train.jsonl"), "max_length": 64},
        "train": {
            "learning_rate": 2e-2,
            "weight_decay": 0.1,
            "max_steps": size["steps"],
            "global_batch_size": size["batch"],
            "micro_batch_size": min(16, size["batch"]),
            "warmup_ratio": 0.03,
            "schedule": "cosine",
        },
        "engine": {"name": "single"},
        "evaluation": {
            "batch_size": 64,
            "adaptation": {"path": str(work / "data" / f"{name}_test.jsonl")},
            "retention": retention(size),
            "baselines": {
                "lora": {
                    "adapter": {"method": "lora", "rank": RANKS["lora"]},
                    "train": {"learning_rate": 2e-3, "weight_decay": 0.0, "update_grams": True},
                }
            },
        },
        "output_dir": str(work / "runs" / name),
    }


def retention(size: dict[str, Any]) -> dict[str, Any]:
    return {k: {"path": str(TINY / "data" / f"retention_{k}.jsonl"), "samples": size["asked"]} for k in KEPT}


def merges(kind: str, tasks: Sequence[str], work: Path, size: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Merge → what its recipe has beside the adapters."""
    compressed = {"target_rank": RANKS[kind]}
    texts = {
        task: {
            "path": str(work / "data" / f"{task}_train.jsonl"),
            "text_field": "prompt",
            "samples": size["nsc_inputs"],
            "max_length": 64,
        }
        for task in tasks
    }
    share = round(1 / len(tasks), 2)
    made: dict[str, dict[str, Any]] = {
        f"arithmetic_{share}": {"method": "arithmetic", "coefficient": 1 / len(tasks)},
        "arithmetic_0.5": {"method": "arithmetic", "coefficient": 0.5},
        "arithmetic_1": {"method": "arithmetic", "coefficient": 1.0},
        "cat_1": {"method": "cat", "coefficient": 1.0},
        "svd_1": {"method": "svd", "coefficient": 1.0} | compressed,
        "ties_1": {"method": "ties", "coefficient": 1.0} | compressed,
        "dare_ties_1": {"method": "dare_ties", "coefficient": 1.0} | compressed,
        "gram": {"method": "gram"},
        "nsc": {"method": "nsc", "nsc": {"steps": size["nsc_steps"]}, "inputs": texts},
    }
    if size is QUICK:
        chosen = ("arithmetic_0.5", "ties_1") if kind == "lora" else ("gram", "nsc")
        return {name: made[name] for name in chosen}
    return made


def merge(name: str, kind: str, settings: dict[str, Any], tasks: Sequence[str], work: Path) -> dict[str, Any]:
    """Writes one merge's recipe, runs it and gives its report."""
    folder = work / "_".join(["merged", *tasks]) / f"{kind}_{name}"
    settings = dict(settings)
    own = {"coefficient": settings.pop("coefficient")} if "coefficient" in settings else {}
    tree = settings | {
        "base_model": {"path": str(TINY / "base"), "dtype": "float32"},
        "adapters": {task: {"path": str(work / "runs" / task / KINDS[kind])} | own for task in tasks},
        "output_dir": str(folder),
    }
    folder.parent.mkdir(exist_ok=True)
    recipe = folder.parent / f"{kind}_{name}.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    if not folder.exists():
        launch("merge", folder.parent / f"{kind}_{name}.log", "--recipe", str(recipe))
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report | {"folder": folder / "adapter"}


def measured(folders: dict[str, Path], tasks: Sequence[str], work: Path, size: dict[str, Any]) -> dict[str, Any]:
    """``evaluation.json`` of every adapter on every task and on what the base knew."""
    tree = job("evaluation", work, size)
    asked = {f"task_{task}": {"path": str(work / "data" / f"{task}_test.jsonl")} for task in tasks}
    tree["data"]["path"] = "none"
    tree["evaluation"] = {"batch_size": 64, "retention": retention(size) | asked}
    recipe, target = work / "evaluation.yaml", work / "evaluation.json"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    target.unlink(missing_ok=True)
    given = [f"--adapter={name}={folder}" for name, folder in folders.items()]
    launch("evaluate", work / "evaluation.log", "--recipe", str(recipe), "--output", str(target), *given)
    return json.loads(target.read_text(encoding="utf-8"))


def summary(found: dict[str, Any], kinds: dict[str, Sequence[str]], tasks: Sequence[str]) -> dict[str, Any]:
    """The figures of an evaluation."""
    figures: dict[str, Any] = {}
    base = found["evaluation"]["base"]["retention_by"]
    for task in tasks:
        figures[f"task_base_{task}"] = round(base[f"task_{task}"], 4)
    figures["retention_base"] = round(sum(base[k] for k in KEPT) / len(KEPT), 4)
    for kind, names in kinds.items():
        own = {task: found["evaluation"][f"{kind}_single_{task}"]["retention_by"][f"task_{task}"] for task in tasks}
        for name in names:
            scores = found["evaluation"][f"{kind}_{name}"]["retention_by"]
            got = {task: scores[f"task_{task}"] for task in tasks}
            figures |= {f"task_{kind}_{name}_{task}": round(value, 4) for task, value in got.items()}
            if not name.startswith("single"):
                known = [got[task] / own[task] for task in tasks if own[task] > 0]
                figures[f"of_single_{kind}_{name}"] = round(sum(known) / len(known), 4) if known else None
            figures[f"retention_{kind}_{name}"] = round(sum(scores[k] for k in KEPT) / len(KEPT), 4)
            rms = found["interference_by_arm"][f"{kind}_{name}"]["rms"]
            figures[f"rms_interference_{kind}_{name}"] = float(f"{rms:.3g}")
    return figures


def table(figures: dict[str, Any], kinds: dict[str, Sequence[str]], tasks: Sequence[str]) -> str:
    """One row a merge and kind."""
    header = ["adapters", "merge", *(task.replace("_", " ") for task in tasks), "of single", "retention"]
    rows = [["base", "", *(_share(figures[f"task_base_{t}"]) for t in tasks), "–", _share(figures["retention_base"])]]
    for kind, names in kinds.items():
        for name in names:
            own = [_share(figures[f"task_{kind}_{name}_{task}"]) for task in tasks]
            single, kept = figures.get(f"of_single_{kind}_{name}"), figures[f"retention_{kind}_{name}"]
            rows.append([kind.replace("_", " "), name.replace("_", " "), *own, _share(single), _share(kept)])
    return markdown_table(header, rows)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def study(work: Path, args: Any) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Trains, merges, evaluates; figures, settings and the table."""
    size, rows = (QUICK, QUICK_ROWS) if args.quick else (SIZE, ROWS)
    drawn = tiny_tasks.merge_tasks(tiny_world.make_world(0), **rows)
    tasks = args.tasks or [task for task in drawn if not args.quick or task != "minimum"]
    tiny_tasks.write_tasks(drawn, work / "data")
    for task in tasks:
        recipe = work / f"{task}.yaml"
        recipe.write_text(yaml.safe_dump(job(task, work, size)), encoding="utf-8")
        launch("train", work / f"train_{task}.log", "--recipe", str(recipe))
        print(f"trained {task}", flush=True)
    folders = {f"{kind}_single_{task}": work / "runs" / task / KINDS[kind] for kind in KINDS for task in tasks}
    names: dict[str, Sequence[str]] = {}
    figures: dict[str, Any] = {}
    for kind in KINDS:
        wanted = merges(kind, tasks, work, size)
        for name, settings in wanted.items():
            report = merge(name, kind, settings, tasks, work)
            assert report["shared_a"] == (kind == "shared_a"), f"{kind}: A is shared where it should not be, or is not"
            folders[f"{kind}_{name}"] = report["folder"]
            figures[f"rank_{kind}_{name}"] = report["rank"]
            if report["warnings"]:
                figures[f"warning_{kind}_{name}"] = " ".join(report["warnings"])
            if "nsc" in report:
                blocks = report["nsc"]["coefficients"]
                figures[f"coefficients_{kind}_{name}"] = {
                    b: {t: round(x, 3) for t, x in c.items()} for b, c in blocks.items()
                }
            print(f"merged {kind} {name}", flush=True)
        names[kind] = [*(f"single_{task}" for task in tasks), *wanted]
    found = measured(folders, tasks, work, size)
    for kind, arm in (("lora", "lora"), ("shared_a", "null_space")):
        for task in tasks:
            trained = json.loads((work / "runs" / task / "report.json").read_text(encoding="utf-8"))["evaluation"]
            again = found["evaluation"][f"{kind}_single_{task}"]["retention_by"][f"task_{task}"]
            assert abs(again - trained[arm]["adaptation"]) < 0.01, f"{kind} {task}: training and evaluation disagree"
    figures = summary(found, names, tasks) | figures
    example = job("TASK", Path("WORK"), size)
    settings = {
        "quick": args.quick,
        "size": size,
        "rows": rows,
        "tasks": tasks,
        "ranks": RANKS,
        "train": example["train"],
    }
    settings |= {"lora_train": example["evaluation"]["baselines"]["lora"]["train"], "density": 0.2, "seed": 0}
    return figures, settings, table(figures, names, tasks)


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--quick", action="store_true", help="a toy size, to see that it runs")
    cli.add_argument("--work", type=Path, metavar="FOLDER", help="keep runs and merges here, and take up those there")
    cli.add_argument("--tasks", nargs="+", choices=["difference", "minimum", "new_facts"], help="at least two")
    args = cli.parse_args()
    if args.tasks and len(set(args.tasks)) < 2:
        cli.error("--tasks: a merge needs at least two")
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) if args.work is None else args.work.absolute()
        work.mkdir(parents=True, exist_ok=True)
        figures, settings, rows = study(work, args)
    show(figures)
    print(f"\n{rows}")
    write_result(args.json, figures, settings)


if __name__ == "__main__":
    main()
