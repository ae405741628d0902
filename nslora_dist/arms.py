"""What an arm's training came to, kept beside its adapter, so that the same command again does not train it again."""

import hashlib
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from nslora_dist import __version__, artifacts, dist
from nslora_dist.batches import IGNORED
from nslora_dist.evaluate import EvaluationSets
from nslora_dist.export import WEIGHTS_FILE
from nslora_dist.manifests import listed_files
from nslora_dist.recipe import Recipe
from nslora_dist.report import strict

log = logging.getLogger("nslora_dist")


class FinishedArm:
    """``output_dir/arms/<name>.json``: the figures of an arm whose adapter is on disk.

    It counts only while everything it depends on is the same (recipe, base, texts, rows; engine and ranks change
    numbers by rounding alone) and the adapter's bytes are the ones it was written for.
    """

    def __init__(self, run: Path, name: str, adapter: Path, *, arm: Recipe, hashes: dict[str, Any]) -> None:
        """``hashes`` are those of base, calibration texts, training rows and evaluation sets."""
        self.path = run / "arms" / f"{name}.json"
        self.name, self.adapter = name, adapter
        recipe = arm.lasting()
        del recipe["name"], recipe["evaluation"]["baselines"]
        self.key = artifacts.hash_json({"recipe": recipe, "hashes": hashes, "version": __version__})

    def read(self) -> dict[str, Any] | None:
        """The arm's figures, on every rank; None where it has to be trained."""
        found = None
        with dist.together("reading an earlier arm"):
            if dist.is_main() and self.path.is_file():
                kept = _read(self.path)
                weights = self.adapter / WEIGHTS_FILE
                if kept.get("key") == self.key and weights.is_file():
                    found = kept["figures"] if artifacts.hash_file(weights) == kept["adapter"] else None
        figures: Any = dist.share(found)
        if figures is not None:
            log.info(
                "%s: trained before on the same recipe, base and rows; delete %s to train anew", self.name, self.path
            )
        return figures

    def write(self, figures: dict[str, Any]) -> None:
        """Keeps the figures, null for what is not finite (a metric of lm-eval, say); after the adapter is written."""
        with dist.together("keeping an arm's figures"):
            if dist.is_main():
                self.path.parent.mkdir(exist_ok=True)
                kept = {"key": self.key, "adapter": artifacts.hash_file(self.adapter / WEIGHTS_FILE)}
                artifacts.write_sealed(self.path, kept | {"figures": strict(figures)})
                self.measured.unlink(missing_ok=True)

    @property
    def measured(self) -> Path:
        """``output_dir/arms/<name>.measured.json``: what was measured of an adapter that is not on disk yet."""
        return self.path.with_suffix(".measured.json")

    def read_measured(self, checkpoint: Path) -> dict[str, Any] | None:
        """What an earlier process measured of the very state in ``checkpoint``, on every rank; None where nothing.

        Evaluation may take hours (lm-eval), and the export after it meets the full disk.
        """
        found = None
        with dist.together("reading what was measured"):
            if dist.is_main() and self.measured.is_file():
                kept = _read(self.measured)
                found = kept["figures"] if kept.get("key") == self._key_of(checkpoint) else None
        figures: Any = dist.share(found)
        if figures is not None:
            log.info("%s: evaluated before; delete %s to evaluate anew", self.name, self.measured)
        return figures

    def write_measured(self, checkpoint: Path, figures: dict[str, Any]) -> None:
        """Keeps them until the adapter is written; ``checkpoint`` is the state that they are of."""
        with dist.together("keeping what was measured"):
            if dist.is_main():
                self.path.parent.mkdir(exist_ok=True)
                kept = {"key": self._key_of(checkpoint), "figures": strict(figures)}
                artifacts.write_sealed(self.measured, kept)

    def _key_of(self, checkpoint: Path) -> dict[str, str]:
        """What figures of a state depend on: all that the arm's do, and that state's bytes."""
        return {"arm": self.key, "state": listed_files(checkpoint)}


class BaseScores:
    """``output_dir/arms/base.json``: the base's own scores, measured once for all arms and all starts of a run."""

    def __init__(self, run: Path, *, arm: Recipe, base: str, evaluation: str) -> None:
        """``base`` is the base's fingerprint, ``evaluation`` the ``evaluation_hash``."""
        self.path = run / "arms" / "base.json"
        held = arm.base_model.model_dump(mode="json", include={"dtype", "quantization", "attention"})
        self.key = artifacts.hash_json({"base": base, "held": held, "evaluation": evaluation, "version": __version__})

    def read(self) -> dict[str, Any] | None:
        """The scores, on every rank; None where they have to be measured."""
        found = None
        with dist.together("reading the base's scores"):
            if dist.is_main() and self.path.is_file():
                kept = _read(self.path)
                found = kept["scores"] if kept.get("key") == self.key else None
        scores: Any = dist.share(found)
        return scores

    def write(self, scores: dict[str, Any]) -> None:
        """Keeps them, null for what is not finite."""
        with dist.together("keeping the base's scores"):
            if dist.is_main():
                self.path.parent.mkdir(exist_ok=True)
                artifacts.write_sealed(self.path, {"key": self.key, "scores": strict(scores)})


def _read(path: Path) -> dict[str, Any]:
    """What was kept there, to the digit: it goes into report and card."""
    return artifacts.read_sealed(path, remedy="delete it, and the same command measures or trains that anew")


def evaluation_hash(sets: EvaluationSets) -> str:
    """sha256 over all ranks' evaluation rows, in whatever order they were dealt: the same for any number of ranks."""
    found: dict[str, int] = {}
    for name, batches in (("", sets.adaptation or []), *sets.retention.items()):
        total = sum(_row_hash(ids, labels) for b in batches for ids, labels in zip(b.input_ids, b.labels, strict=True))
        found[name] = sum(dist.gather(total)) % 2**256
    tasks = {} if sets.lm_eval is None else {"lm_eval": [sets.lm_eval.hash, sets.lm_eval.section.before]}
    return artifacts.hash_json({name: f"{total:x}" for name, total in found.items()} | tasks)


def _row_hash(ids: Tensor, labels: Tensor) -> int:
    """Of a row up to its last scored token, which its padding comes after; 0 for rows that only fill up."""
    scored = (labels != IGNORED).nonzero()
    if not len(scored):
        return 0
    end = int(scored[-1]) + 1
    digest = hashlib.sha256(ids[:end].numpy().tobytes() + labels[:end].numpy().tobytes())
    return int.from_bytes(digest.digest(), "big")
