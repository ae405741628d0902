"""What an adapter learned and what it kept: adaptation and retention, by greedy exact match, and lm-eval's tasks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nslora_dist import dist, watch
from nslora_dist.bad_rows import RowCounts
from nslora_dist.data import Batch, deal_evaluation, evaluation_samples
from nslora_dist.engines import Engine
from nslora_dist.lm_eval_bridge import LmEval
from nslora_dist.recipe import EvaluationSection
from nslora_dist.recipe_data import PromptSet

ADAPTATION = "adaptation"


@dataclass(frozen=True)
class EvaluationSets:
    """This rank's batches of the adaptation set and of every retention set.

    Attributes:
        adaptation: None where it was not asked for.
        retention: By name.
        counts: ``adaptation`` or ``retention.<name>`` → what became of the set's rows, over all ranks.
        lm_eval: lm-eval's tasks, where the recipe names some.
    """

    adaptation: list[Batch] | None
    retention: dict[str, list[Batch]]
    counts: dict[str, RowCounts] = field(default_factory=dict)
    lm_eval: LmEval | None = None

    @classmethod
    def load(
        cls,
        section: EvaluationSection,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base: Path | None = None,
        context: int | None = None,
    ) -> "EvaluationSets":
        """Reads and tokenises every set; every rank must call this.

        Args:
            section: the recipe's.
            tokenizer: the base's.
            base: its folder; lm-eval's tasks are left out without one.
            context: positions that the base is made for; longer questions, answer included, are left out.

        Raises:
            UserError: rows that cannot be read, or tasks that lm-eval cannot run.
        """
        counts: dict[str, RowCounts] = {}
        longest = section.max_length if context is None else min(section.max_length, context)

        def load(where: str, prompts: PromptSet) -> list[Batch]:
            name = f"evaluation.{where}"
            samples = evaluation_samples(prompts, tokenizer, max_length=longest, name=name)
            counts[where] = samples.counts
            here = {"rank": dist.rank(), "world_size": dist.world_size()}
            return deal_evaluation(samples, tokenizer, batch_size=section.batch_size, **here)

        return cls(
            adaptation=None if section.adaptation is None else load("adaptation", section.adaptation),
            retention={name: load(f"retention.{name}", prompts) for name, prompts in section.retention.items()},
            counts=counts,
            lm_eval=LmEval(section.lm_eval, tokenizer, base) if section.lm_eval is not None and base else None,
        )

    @property
    def largest_tokens(self) -> dict[str, int]:
        """``evaluation.adaptation`` or ``evaluation.retention.<name>`` → the largest token of this rank's questions."""
        named = {f"retention.{name}": batches for name, batches in self.retention.items()}
        named |= {ADAPTATION: self.adaptation} if self.adaptation is not None else {}
        return {
            f"evaluation.{name}": max((int(batch.input_ids.max()) for batch in batches), default=0)
            for name, batches in named.items()
        }

    def before_training(self) -> "EvaluationSets":
        """What is measured on the base."""
        left_out = self.lm_eval is not None and not self.lm_eval.section.before
        return replace(self, lm_eval=None) if left_out else self


def exact_match(engine: Engine, batches: Sequence[Batch], *, device: torch.device, name: str = "questions") -> float:
    """Share of questions that greedy decoding answers exactly, over all ranks, in 0..1.

    Raises:
        Preempted: a rank was asked to stop before the set named ``name``.
    """
    dist.stop_if_asked(f"evaluation: stopped before {name}")
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for number, batch in enumerate(batches, start=1):
        watch.progress(f"{name}, batch {number} of {len(batches)}")
        totals[0] += engine.matches(batch.to(device)).sum()
        totals[1] += batch.supervised_rows
    right, asked = dist.numbers(dist.all_reduce(totals))
    return right / asked


def evaluate(engine: Engine, sets: EvaluationSets, *, device: torch.device) -> dict[str, Any]:
    """``adaptation``, ``retention`` (the mean over names) and ``retention_by`` name; None where nothing was asked.

    ``lm_eval``, as ``LmEval.run`` gives it, where the recipe names tasks.
    """
    with engine.whole():
        retention = {
            name: exact_match(engine, batches, device=device, name=name) for name, batches in sets.retention.items()
        }
        task = sets.adaptation
        return {
            "adaptation": None if task is None else exact_match(engine, task, device=device, name=ADAPTATION),
            "retention": sum(retention.values()) / len(retention) if retention else None,
            "retention_by": retention,
            **({} if sets.lm_eval is None else {"lm_eval": sets.lm_eval.run(engine, device=device)}),
        }
