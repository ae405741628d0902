"""EleutherAI's lm-eval on the engine's own model; the package is imported here alone, and only where it is asked for.

Rank 0 runs lm-eval: it alone loads tasks, makes prompts and counts. Whenever lm-eval asks its model for something,
all ranks answer together (``scoring.py``), so that a model that fits no single GPU needs no second copy.
"""

import hashlib
import importlib.metadata
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from nslora_dist import artifacts, dist, watch
from nslora_dist.engines import Engine
from nslora_dist.errors import UserError
from nslora_dist.lm_eval_tasks import load_tasks, warn_of_settings
from nslora_dist.recipe_lm_eval import LmEvalSection
from nslora_dist.scoring import continuations, log_likelihoods

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
        self.section, self.base = section, base
        self.tokenizer = deepcopy(tokenizer)  # lm-eval gives one without a pad token a pad token
        self.tasks: Mapping[str, Any] = {}
        found = ""
        with dist.together("loading lm-eval's tasks"):
            generation = _generation(base)
            self.ends = _end_tokens(generation, tokenizer)
            if section.apply_chat_template and not tokenizer.chat_template:
                raise UserError(
                    f"evaluation.lm_eval.apply_chat_template: the tokenizer in {base} has no chat template; set it to "
                    "false, or take a base that was tuned to chat"
                )
            if dist.is_main():
                with watch.working():  # data sets may have to be fetched
                    self.tasks = load_tasks(section, most=_max_length(base, tokenizer))
                warn_of_settings(generation, self.tasks["tasks"])
                found = _hash(section)
        self.hash = str(dist.share(found))

    def run(self, engine: Engine, *, device: torch.device) -> dict[str, Any]:
        """Task or group → ``metrics`` (name → value and stderr), ``samples``, ``shots`` and ``version``; collective.

        Log-probabilities are float32 whatever the base computes in, as with ``lm_eval``'s ``softmax_dtype=float32``.

        Raises:
            Preempted: a rank was asked to stop.
        """
        model = _Model(self, engine, device)
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

    def _evaluate(self, model: "_Model") -> dict[str, Any]:
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


class _Model:
    """What the ranks do together: rank 0 sends a question, all answer it, rank 0 takes the answers."""

    def __init__(self, own: LmEval, engine: Engine, device: torch.device) -> None:
        self.own, self.engine, self.device = own, engine, device
        self.answering = False

    def ask(self, question: tuple[Any, ...]) -> list[Any]:
        """On rank 0: ``answer`` on every rank."""
        dist.share(question, patient=True)
        return self.answer(question)

    def answer(self, question: Any) -> list[Any]:
        """One question: rows to score, or rows to continue until a text comes up."""
        kind, rows, *more = question
        tokenizer = self.own.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        common: dict[str, Any] = {
            "batch_size": self.own.section.batch_size,
            "pad": pad or 0,
            "device": self.device,
            "name": f"lm-eval, {kind}",
        }
        self.answering = True
        answers: list[Any]
        if kind == "log-likelihoods":
            answers = log_likelihoods(self.engine, rows, **common)
        else:
            until, most = more
            answers = continuations(self.engine, rows, ends=self._ends(until), most=most, **common)
        self.answering = False
        return answers

    def _ends(self, until: Sequence[str]) -> Callable[[list[int]], bool]:
        tokenizer, ends = self.own.tokenizer, self.own.ends
        # As lm-eval's own model does it: a text may come about by other tokens than its own, hence two more.
        longest = max((len(tokenizer.encode(text, add_special_tokens=False)) for text in until), default=0) + 2

        def ended(new: list[int]) -> bool:
            if new[-1] in ends:
                return True
            tail = str(tokenizer.decode(new[-longest:]))
            return any(text in tail for text in until if text)

        return ended

    def as_lm(self) -> Any:
        """The model as lm-eval takes it. How texts become tokens and back is lm-eval's own code for Hugging Face."""
        from lm_eval.models.huggingface import HFLM
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        model, own = self, self.own

        class EngineLM(HFLM):
            """Answers lm-eval's requests from the engine."""

            def __init__(self) -> None:
                # lm-eval looks at no more of a model that it has not loaded itself; its passes are all below.
                stand_in = SimpleNamespace(config=_config(own.base), device=model.device, name_or_path=str(own.base))
                super().__init__(stand_in, backend="causal", tokenizer=own.tokenizer)

            def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
                return super().loglikelihood(requests, disable_tqdm=True)

            def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
                return model.ask(("log-likelihoods", [self._row(before, scored) for _, before, scored in requests]))

            def _row(self, before: list[int], scored: list[int]) -> tuple[np.ndarray, int]:
                if not before or not scored:  # lm-eval's own model refuses these as well
                    text = self.tok_decode([*before, *scored])[-60:]
                    what = "nothing before the answer" if scored else "an answer that adds no token to its question"
                    raise UserError(f"evaluation.lm_eval: a task has {what}, at '{text}'; leave that task out")
                if len(scored) > self.max_length:
                    raise UserError(
                        f"evaluation.lm_eval: an answer of {len(scored)} tokens, and the model takes {self.max_length}"
                    )
                row = np.array((before + scored)[-(self.max_length + 1) :], dtype=np.int32)
                return row, len(scored)

            def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
                windows = [
                    [
                        self._row(*make_disjoint_window(window))
                        for window in get_rolling_token_windows(
                            token_list=self.tok_encode(request.args[0]),
                            prefix_token=self.prefix_token_id,
                            max_seq_len=self.max_length,
                            context_len=1,
                        )
                    ]
                    for request in requests
                ]
                found = iter(model.ask(("log-likelihoods", [row for rows in windows for row in rows])))
                return [sum(next(found)[0] for _ in rows) for rows in windows]

            def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
                eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
                kinds: dict[tuple[tuple[str, ...], int], list[int]] = {}
                for number, request in enumerate(requests):
                    wanted = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
                    until = handle_stop_sequences(wanted["until"], eos=eos)
                    kinds.setdefault((tuple(until), wanted["max_gen_toks"]), []).append(number)
                texts = [""] * len(requests)
                for (until, most), numbers in kinds.items():
                    rows = [self._prompt(requests[number].args[0], self.max_length - most) for number in numbers]
                    for number, new in zip(numbers, model.ask(("answers", rows, until, most)), strict=True):
                        texts[number] = postprocess_generated_text(self.tok_decode(new), list(until), None)
                return texts

            def _prompt(self, text: str, most: int) -> np.ndarray:
                ids, _ = self.tok_batch_encode([text], left_truncate_len=most)
                return ids[0].numpy().astype(np.int32)

        return EngineLM()


def _config(base: Path) -> Any:
    return AutoConfig.from_pretrained(base, trust_remote_code=False)


def _max_length(base: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[[], int]:
    """The tokens that lm-eval gives this model, once lm-eval is known to be there."""

    def found() -> int:
        from lm_eval.defaults import DEFAULT_MAX_LENGTH
        from lm_eval.models.utils import resolve_max_length

        return int(resolve_max_length(_config(base), tokenizer, default=DEFAULT_MAX_LENGTH))

    return found


def _generation(base: Path) -> GenerationConfig:
    """What the base says of generation: in ``generation_config.json``, else in the model's config."""
    try:
        return GenerationConfig.from_pretrained(base)
    except OSError:
        return GenerationConfig.from_model_config(_config(base))


def _end_tokens(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: the tokenizer's and the base's."""
    named: Any = generation.eos_token_id
    listed = named if isinstance(named, list) else [named]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}


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
