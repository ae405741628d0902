"""What an arm's training came to, kept beside its adapter, so that the same command again does not train it again."""

import hashlib
import logging
from pathlib import Path
from typing import Any

from nslora_dist import __version__, artifacts, dist
from nslora_dist.evaluate import EvaluationSets
from nslora_dist.export import WEIGHTS_FILE
from nslora_dist.recipe import Recipe

log = logging.getLogger("nslora_dist")

VOLATILE: Any = {
    "output_dir": True,
    "name": True,
    "engine": {"config", "timeout_seconds"},
    "checkpoint": True,
    "resume": True,
    "train": {"log_every"},
    "evaluation": {"baselines"},
}
"""Parts of a recipe that change neither an arm's adapter nor its figures."""


class FinishedArm:
    """``output_dir/arms/<name>.json``: the figures of an arm whose adapter is on disk.

    It counts only while everything it depends on is the same (recipe, engine, ranks, base, texts, rows) and the
    adapter's bytes are the ones it was written for.
    """

    def __init__(self, run: Path, name: str, adapter: Path, *, arm: Recipe, hashes: dict[str, Any]) -> None:
        """``hashes`` are those of base, calibration texts, training rows and evaluation sets."""
        self.path = run / "arms" / f"{name}.json"
        self.name, self.adapter = name, adapter
        self.key = artifacts.hash_json(
            {
                "recipe": arm.model_dump(mode="json", exclude=VOLATILE),
                "hashes": hashes,
                "world_size": dist.world_size(),
                "version": __version__,
            }
        )

    def read(self) -> dict[str, Any] | None:
        """The arm's figures, on every rank; None where it has to be trained."""
        found = None
        with dist.together("reading an earlier arm"):
            if dist.is_main() and self.path.is_file():
                kept = artifacts.read_json(self.path)
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
        """Keeps the figures; after the adapter has been written."""
        with dist.together("keeping an arm's figures"):
            if dist.is_main():
                self.path.parent.mkdir(exist_ok=True)
                kept = {"key": self.key, "adapter": artifacts.hash_file(self.adapter / WEIGHTS_FILE)}
                artifacts.write_json(self.path, kept | {"figures": figures})


def evaluation_hash(sets: EvaluationSets) -> str:
    """sha256 over every rank's evaluation tokens, the same on every rank."""
    digest = hashlib.sha256()
    for batches in (sets.adaptation or [], *sets.retention.values()):
        for batch in batches:
            digest.update(batch.input_ids.numpy().tobytes())
            digest.update(batch.labels.numpy().tobytes())
    return artifacts.hash_json(dist.gather(digest.hexdigest()))
