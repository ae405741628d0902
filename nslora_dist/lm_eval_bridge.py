"""EleutherAI's lm-eval on the engine's own model; the package is imported only where it is asked for.

Rank 0 runs lm-eval: it alone loads tasks, makes prompts and counts. Whenever lm-eval asks its model for something,
all ranks answer together (``lm_eval_model.py``), so that a model that fits no single GPU needs no second copy.
"""

import hashlib
import importlib.metadata
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from nslora_dist import artifacts, dist, watch
from nslora_dist.engines import Engine
from nslora_dist.errors import UserError
from nslora_dist.lm_eval_model import Base, EngineModel
from nslora_dist.lm_eval_tasks import load_tasks, warn_of_settings
from nslora_dist.recipe_lm_eval import LmEvalSection

SEED = 1234
"""lm-eval's own default, for few-shot examples."""


class LmEval:
    """The recipe's tasks, found and loaded before anything is trained.

    Attributes:
        section: the recipe's.
        hash: of what the numbers depend on besides the model.
    """

    def __init__(self, section: LmEvalSection, tokenizer: PreTrainedTokenizerBase, base: Path) -> None:
        """Loads the tasks with their data sets on rank 0; every rank must call this.

        Args:
            section: the recipe's.
            tokenizer: the base's.
            base: its folder.

        Raises:
            UserError: lm-eval is not installed, a task is unknown, cannot be loaded, or asks for what is not here.
        """
        self.section = section
        self.tasks: Mapping[str, Any] = {}
        found = ""
        with dist.together("loading lm-eval's tasks"):
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
            generation = _generation(base, config)
            self.base = Base(base, config, deepcopy(tokenizer), _end_tokens(generation, tokenizer))
            if section.apply_chat_template and not tokenizer.chat_template:
                raise UserError(
                    f"evaluation.lm_eval.apply_chat_template: the tokenizer in {base} has no chat template; set it to "
                    "false, or take a base that was tuned to chat"
                )
            if dist.is_main():
                with watch.working():  # data sets may have to be fetched
                    self.tasks = load_tasks(section, most=_max_length(config, tokenizer))
                warn_of_settings(generation, self.tasks["tasks"])
                found = _hash(section)
        self.hash = str(dist.share(found))

    def run(self, engine: Engine, *, device: torch.device) -> dict[str, Any]:
        """Task or group → ``metrics`` (name → value and stderr), ``samples``, ``shots`` and ``version``; collective.

        Log-probabilities are float32 whatever the base computes in, as with ``lm_eval``'s ``softmax_dtype=float32``.

        Raises:
            Preempted: a rank was asked to stop.
        """
        model = EngineModel(self.base, engine, batch_size=self.section.batch_size, device=device)
        results: dict[str, Any] = {}
        failure: Exception | None = None
        if dist.is_main():
            try:
                with watch.working():  # its draws for a standard error of F1 take minutes to hours
                    results = self._evaluate(model)
            except Exception as error:
                if model.answering:  # the other ranks are in the same pass, and no answer to them would be heard
                    raise
                failure = error
            dist.share(None, patient=True)
        else:
            while (question := dist.share(None, patient=True)) is not None:
                model.answer(question)
        with dist.together("lm-eval"):
            if failure is not None:
                raise failure
        shared: Any = dist.share(results)
        return shared

    def _evaluate(self, model: EngineModel) -> dict[str, Any]:
        from lm_eval.evaluator import evaluate

        for task in self.tasks["tasks"].values():
            task.set_fewshot_seed(seed=SEED)  # each time anew: base and arms are asked with the same examples
        with _own_randomness(), _environment(self.section):
            found = evaluate(
                model.as_lm(),
                task_dict=self.tasks,
                limit=self.section.limit,
                log_samples=False,
                apply_chat_template=self.section.apply_chat_template,
                fewshot_as_multiturn=self.section.apply_chat_template,
                confirm_run_unsafe_code=self.section.allow_code_execution,
            )
        return _figures(found)


def _max_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[], int]:
    """The tokens that lm-eval gives this model, once lm-eval is known to be there."""

    def found() -> int:
        from lm_eval.defaults import DEFAULT_MAX_LENGTH
        from lm_eval.models.utils import resolve_max_length

        return int(resolve_max_length(config, tokenizer, default=DEFAULT_MAX_LENGTH))

    return found


def _generation(base: Path, config: PreTrainedConfig) -> GenerationConfig:
    """What the base says of generation: in ``generation_config.json``, else in the model's config."""
    try:
        return GenerationConfig.from_pretrained(base)
    except OSError:
        return GenerationConfig.from_model_config(config)


def _end_tokens(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's and the base's."""
    named: Any = generation.eos_token_id
    listed = named if isinstance(named, list) else [named]
    return frozenset(int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None)


def _hash(section: LmEvalSection) -> str:
    """Section, lm-eval's version and the bytes of every file in ``include_path``."""
    files: dict[str, str] = {}
    if section.include_path is not None:
        folder = Path(section.include_path)
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"):
            files[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    settings = section.model_dump(mode="json", exclude={"batch_size", "include_path", "before"})
    return artifacts.hash_json({"section": settings, "files": files, "lm_eval": importlib.metadata.version("lm-eval")})


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's results without what it says of the machine."""
    figures: dict[str, Any] = {}
    for task, entry in found["results"].items():
        metrics: dict[str, dict[str, float | None]] = {}
        for key, value in entry.items():
            name, comma, filter_ = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float | np.number):
                continue
            error = entry.get(f"{name}_stderr,{filter_}")
            shown = name if filter_ == "none" else f"{name} ({filter_})"
            metrics[shown] = {
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float | np.number) else None,
            }
        if not metrics:
            continue  # a group that only lists its tasks
        samples = found.get("n-samples", {}).get(task, {}).get("effective")
        figures[task] = {
            "metrics": metrics,
            "samples": samples,
            "shots": found.get("n-shot", {}).get(task),
            "version": found.get("versions", {}).get(task),
        }
    return figures


@contextmanager
def _own_randomness() -> Iterator[None]:
    """lm-eval's seeds for what tasks draw from the global generators, and the run's own states behind it."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(0)
        np.random.seed(SEED)
        torch.random.default_generator.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _environment(section: LmEvalSection) -> Iterator[None]:
    """No forks of a process that holds GPUs, and leave to run programs only where the recipe gives it."""
    wanted = {"DISABLE_MULTIPROC": "1"} | ({"HF_ALLOW_CODE_EVAL": "1"} if section.allow_code_execution else {})
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
