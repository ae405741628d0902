"""Training state on disk: taken between two steps, written behind the next ones, and taken up by any engine.

A checkpoint of step N is what was known after N optimizer steps: trained parameters, AdamW's moments and step count,
the curve so far, and where the data goes on. The schedule and the order of the data are functions of the step, random
states of seed, step and rank, so neither the engine nor the number of ranks is part of it.

Order of events, so that no moment of a death leaves half a checkpoint: every rank copies its shards to host memory and
writes them in a thread into ``.step-N.partial``; between two later steps, when every rank's file is on the disk and
the step after N has shown a finite loss, rank 0 adds the manifest and renames the folder. Where no step follows, at the
end and when asked to stop, it does so at once.
"""

import logging
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nslora_dist import __version__, dist, folders, manifests, watch
from nslora_dist.checkpoint_files import Pieces, on_host, part_name, write_part
from nslora_dist.engines import Engine
from nslora_dist.errors import UserError
from nslora_dist.recipe import CheckpointSection, Recipe

log = logging.getLogger("nslora_dist")

FORMAT = 1
STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Found:
    """A checkpoint that can be taken up."""

    folder: Path
    manifest: dict[str, Any]
    pieces: Pieces


@dataclass
class _Writing:
    """A checkpoint on its way to the disk."""

    step: int
    facts: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    part: "Future[dict[str, Any]]"
    good: bool


def identity(arm: Recipe, hashes: dict[str, Any]) -> dict[str, Any]:
    """What a training has to share with a checkpoint to go on from it: everything that its numbers depend on."""
    lasting = arm.lasting()
    base = {key: lasting["base_model"][key] for key in ("dtype", "quantization", "attention")}
    data = {key: lasting["data"][key] for key in ("packing", "max_length")}
    # Paths are not part of it, but the hashes of what they hold: a run may move to another machine.
    return {"base_model": base, "adapter": lasting["adapter"], "train": lasting["train"], "data": data, **hashes}


class Checkpoints:
    """The checkpoints of one arm, ``folder/step-N``. Every method is collective."""

    def __init__(self, folder: Path, section: CheckpointSection, *, belongs_to: dict[str, Any], engine: str) -> None:
        """``belongs_to`` is the arm's ``identity``; ``engine`` is named in the history."""
        self.folder, self.section = folder, section
        self.belongs_to, self.engine = belongs_to, engine
        self.last: int | None = None
        self.found: Found | None = None
        self.earlier: list[dict[str, Any]] = []
        self._writing: _Writing | None = None
        self._late = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    @property
    def step(self) -> int:
        """The step that training goes on from: 0 where there is nothing to take up."""
        return 0 if self.found is None else int(self.found.manifest["step"])

    @property
    def earlier_seconds(self) -> float:
        """Seconds that processes before this one have trained."""
        return 0.0 if self.found is None else float(self.found.manifest["facts"]["seconds"])

    @property
    def history(self) -> list[dict[str, Any]]:
        """Who trained from which step to which: engine and number of ranks."""
        return self._history(self.last or 0)

    def _history(self, step: int) -> list[dict[str, Any]]:
        stretch = {"engine": self.engine, "world_size": dist.world_size(), "from": self.step, "to": step}
        return [*self.earlier, *([stretch] if step > self.step else [])]

    def look(self) -> None:
        """Finds the newest checkpoint that is whole; a damaged one is named, skipped and left where it is.

        Raises:
            UserError: the newest whole one belongs to another training.
        """
        steps: Any = dist.share(_steps(self.folder) if dist.is_main() else None)
        for step in reversed(steps):
            folder = self.folder / f"step-{step}"
            found = _examine(folder)
            if isinstance(found, str):
                if dist.is_main():
                    log.warning("%s; that checkpoint is skipped", found)
                continue
            theirs = found.manifest["belongs_to"]
            ours = self.belongs_to
            different = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
            if different:
                raise UserError(
                    f"{folder}: was written by a training with another {', '.join(different)}; "
                    f"give another output_dir, or move {self.folder} away to train anew"
                )
            self.found, self.last = found, step
            self.earlier = list(found.manifest["history"])
            watch.saved(str(folder))
            log.info("%s: training goes on from there", folder)
            return

    def restore(self, engine: Engine) -> dict[str, Any]:
        """Puts what ``look`` found into the engine.

        Returns:
            The facts that it was written with; none where there is nothing to take up.
        """
        if self.found is None:
            return {}
        manifest = self.found.manifest
        with dist.together("reading a checkpoint"):
            filled = self.found.pieces.fill(engine.shards())
        engine.restore(filled, updates=manifest["optimizer"]["updates"])
        return dict(manifest["facts"])

    def due(self, step: int) -> bool:
        """Whether a checkpoint of ``step`` is to be started now; a late one is made up for as soon as there is room."""
        every = self.section.every
        self._late = self._late or (every is not None and step % every == 0)
        return self._late and self._writing is None

    def start(self, engine: Engine, step: int, facts: dict[str, Any], *, good: bool = True) -> None:
        """Copies the state to host memory and begins to write it.

        Args:
            engine: between two steps.
            step: steps done, skipped ones included.
            facts: what the trainer wants back; JSON. ``updates`` among them is AdamW's step count.
            good: whether it may take an older one's place.
        """
        target = self.folder / f"step-{step}"
        with dist.together("starting a checkpoint"):
            if dist.is_main():
                folders.open_partial(target)
        shards = on_host(engine.shards())
        path = folders.partial_of(target) / part_name(dist.rank())
        part = self._thread.submit(write_part, path, shards)
        self._writing = _Writing(step, facts, {s.name: s.shape for s in shards}, part, good)
        self._late = False

    def settle(self) -> None:
        """Between two steps: completes what every rank has finished writing, and waits for nothing."""
        if self._writing is not None and dist.everywhere(self._writing.part.done()):
            self._complete(self._writing)

    def abandon(self, step: int) -> None:
        """Drops the checkpoint of ``step``, for what came after it was not finite; the next good step makes up for it.

        One of an earlier step that is still on its way is good, for a finite step has followed it: it is completed.
        """
        if self._writing is None:
            return
        if self._writing.step < step:
            self._complete(self._writing)
            return
        target = self.folder / f"step-{self._writing.step}"
        self._writing.part.exception()  # waits
        self._writing = None
        self._late = True
        dist.barrier()
        with dist.together("dropping a checkpoint"):
            if dist.is_main():
                folders.remove_folder(folders.partial_of(target))

    def finish(self) -> None:
        """Waits for what is being written and completes it."""
        if self._writing is not None:
            self._complete(self._writing)

    def write(self, engine: Engine, step: int, facts: dict[str, Any], *, good: bool = True) -> Path:
        """A checkpoint that is whole on return, for the end of training and for a job that has to leave."""
        self.finish()
        if self.last != step:
            self.start(engine, step, facts, good=good)
            self.finish()
        return self.folder / f"step-{step}"

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _complete(self, writing: _Writing) -> None:
        target = self.folder / f"step-{writing.step}"
        entry: dict[str, Any] = {}
        with dist.together(f"writing {target}"):
            entry = writing.part.result()
        entries = dist.gather(entry)
        self._writing = None
        with dist.together(f"writing {target}"):
            if dist.is_main():
                files = {part_name(rank): entry for rank, entry in enumerate(entries)}
                manifests.write_manifest(folders.partial_of(target), self._manifest(writing), files=files)
                folders.take_place(target)
                if writing.good:
                    self._thin_out(writing.step)
        self.last = writing.step
        watch.saved(str(target))
        log.info("checkpoint: %s", target)

    def _manifest(self, writing: _Writing) -> dict[str, Any]:
        train = self.belongs_to["train"]
        return {
            "kind": "checkpoint",
            "format": FORMAT,
            "version": __version__,
            "step": writing.step,
            "optimizer": {
                "name": "AdamW",
                "updates": writing.facts["updates"],
                "betas": train["betas"],
                "weight_decay": train["weight_decay"],
            },
            "random": {"seed": train["seed"], "rule": "seeded anew before every step from seed, step and rank"},
            "belongs_to": self.belongs_to,
            "history": self._history(writing.step),
            "tensors": {name: list(shape) for name, shape in writing.shapes.items()},
            "facts": writing.facts,
        }

    def _thin_out(self, newest: int) -> None:
        # Steps past the newest are damaged ones that were skipped: not ours to delete, nor to count.
        for step in [step for step in _steps(self.folder) if step <= newest][: -self.section.keep_last]:
            folders.remove_folder(self.folder / f"step-{step}")
        for left in self.folder.glob(".step-*.old"):  # of such a one, where some file was in use then
            folders.discard(left)


def _steps(folder: Path) -> list[int]:
    """The steps of which there is a folder, ascending."""
    if not folder.is_dir():
        return []
    matches = [STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()]
    return sorted(int(match[1]) for match in matches if match)


def _examine(folder: Path) -> Found | str:
    """The checkpoint, every file's hash checked by one of the ranks; or what is wrong with it."""
    read: Any = None
    if dist.is_main():
        try:
            read = manifests.open_manifest(folder)
            if read.get("kind") != "checkpoint" or read.get("format") != FORMAT:
                read = f"{folder}: its manifest is not that of a checkpoint of this version"
        except UserError as error:
            read = str(error)
    manifest: Any = dist.share(read)
    if isinstance(manifest, str):
        return manifest
    files = manifest["files"]
    mine = sorted(files)[dist.rank() :: dist.world_size()]
    faults = [(name, manifests.wrong_file(folder, name, files[name])) for name in mine]
    wrong = next((f"{folder / name}: {what}" for found in dist.gather(faults) for name, what in found if what), None)
    if wrong is not None:
        return wrong
    pieces: Pieces | None = None
    said = ""
    try:
        pieces = Pieces(folder, manifest)
    except UserError as error:
        said = str(error)
    said = next((other for other in dist.gather(said) if other), "")
    if said:
        return said
    assert pieces is not None
    return Found(folder, manifest, pieces)
