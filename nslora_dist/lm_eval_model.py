"""The engine's model as lm-eval takes one: rank 0 is asked, and all ranks answer together (``scoring.py``)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from nslora_dist import dist
from nslora_dist.base_config import check_tokens
from nslora_dist.engines import Engine
from nslora_dist.errors import UserError
from nslora_dist.scoring import continuations, log_likelihoods


@dataclass(frozen=True)
class Base:
    """How texts become tokens of the base, and when an answer of its has ended.

    Attributes:
        folder: its.
        config: its.
        tokenizer: a copy of its own, for lm-eval gives one without a pad token a pad token.
        ends: the tokens that end an answer.
    """

    folder: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]


class EngineModel:
    """What the ranks do together: rank 0 sends a question, all answer it, rank 0 takes the answers.

    Attributes:
        answering: whether the ranks are in a pass, or left one in an error.
    """

    def __init__(self, base: Base, engine: Engine, *, batch_size: int, device: torch.device) -> None:
        """``engine`` holds the base, with an adapter or without; ``batch_size`` is rows a pass and rank."""
        self.base, self.engine, self.batch_size, self.device = base, engine, batch_size, device
        self.answering = False

    def ask(self, question: tuple[Any, ...]) -> list[Any]:
        """On rank 0: ``answer`` on every rank.

        Raises:
            UserError: a text has a token of which the base's embedding has no row; before any rank is asked.
        """
        kind, rows, *_ = question
        tokens = [row for row, _ in rows] if kind == "log-likelihoods" else rows
        largest = max((int(row.max()) for row in tokens), default=0)
        check_tokens(self.base.config, str(self.base.folder), {"evaluation.lm_eval.tasks": largest})
        dist.share(question, patient=True)
        return self.answer(question)

    def answer(self, question: Any) -> list[Any]:
        """One question: rows to score, or rows to continue until a text comes up."""
        kind, rows, *more = question
        tokenizer = self.base.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        common: dict[str, Any] = {
            "batch_size": self.batch_size,
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
        tokenizer, ends = self.base.tokenizer, self.base.ends
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

        model, base = self, self.base

        class EngineLM(HFLM):
            """Answers lm-eval's requests from the engine."""

            def __init__(self) -> None:
                # lm-eval looks at no more of a model that it has not loaded itself; its passes are all below.
                stand_in = SimpleNamespace(config=base.config, device=model.device, name_or_path=str(base.folder))
                super().__init__(stand_in, backend="causal", tokenizer=base.tokenizer)

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
                if not ids.numel():
                    raise UserError("evaluation.lm_eval: a task asks a question without any token; leave that task out")
                return ids[0].numpy().astype(np.int32)

        return EngineLM()
