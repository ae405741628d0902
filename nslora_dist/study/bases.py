"""A study's bases: pre-trained once each, kept in its folder, and shared by all worker processes."""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nslora_dist import artifacts, folders
from nslora_dist.errors import UserError
from nslora_dist.pretrain import PretrainSettings, build_model, greedy_exact_match, pretrain, save_base
from nslora_dist.study.cells import MADE, base_folder, is_made
from nslora_dist.study.knowledge import make_knowledge, write_knowledge
from nslora_dist.study.spec import Size, Study
from nslora_dist.tiny_world import make_tokenizer


def make_base(study: Study, size: str, *, device: torch.device) -> dict[str, Any]:
    """Pre-trains a base where it is not there yet, and writes it with its data, whole or not at all.

    Whoever is killed at it leaves its state beside the folder, where the next one goes on.

    Returns:
        What was measured then: parameters, last loss, recall by piece, seconds.

    Raises:
        UserError: the world cannot be drawn, or the loss was not finite.
    """
    folder, wanted = base_folder(study, size), study.sizes[size]
    state = folder.with_name(f"{folder.name}.pretraining")
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not is_made(study, size):
            with folders.replace_folder(folder) as fresh:
                try:
                    made = _make(study, wanted, fresh, state, device=device)
                except ValueError as error:
                    raise UserError(f"sizes.{size}: {error}") from error
                artifacts.write_json(fresh / MADE, made)
            state.unlink(missing_ok=True)
    found: dict[str, Any] = json.loads((folder / MADE).read_text(encoding="utf-8"))
    return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by one process of this machine at a time; freed by the system when the process ends, however it does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """TensorFloat32 products on a GPU, for a base alone: what is measured later runs in float32."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _make(study: Study, size: Size, folder: Path, state: Path, *, device: torch.device) -> dict[str, Any]:
    started = time.perf_counter()
    knowledge = make_knowledge(size, study.task_rows)
    tokenizer = make_tokenizer(knowledge.world)
    shape = size.shape.model_dump()
    model: Any = build_model(tokenizer, **shape, seed=size.seed)
    model.to(device)
    own = size.pretraining
    settings = PretrainSettings(
        steps=own.steps,
        batch_rows=own.batch_rows,
        mixture={
            "facts": own.facts_share,
            "sum": 0.6 * (1 - own.facts_share),
            "maximum": 0.4 * (1 - own.facts_share),
        },
        learning_rate=own.learning_rate,
        seed=size.seed,
    )
    with _tensor_cores(device):
        losses = pretrain(model, tokenizer, knowledge.world.pretraining, settings, state=state)
    saved = save_base(model.cpu(), tokenizer, folder / "base")
    write_knowledge(knowledge, folder / "data", size=size, tasks=study.task_rows)
    recall = {piece: greedy_exact_match(saved, tokenizer, rows) for piece, rows in knowledge.asked.items()}
    return {
        "parameters": sum(parameter.numel() for parameter in saved.parameters()),
        "loss": losses[-1],
        "recall": recall,
        "seconds": round(time.perf_counter() - started, 1),
    }
