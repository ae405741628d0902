"""From texts and checkpoint to the null space, block by block (docs/methods.md §1.1 to §1.3, §1c, §1d).

While a block's Grams are solved on their owners, in a thread without collectives, the next block is read and its
sequences run; only then are the bases sent round and the held-out texts and probes measured in them. Two blocks'
weights are in memory, one block's Grams, on an owner also those of the block that it solves, and the hidden states,
whatever the depth.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from nslora_dist import dist, watch
from nslora_dist.base_files import BaseFiles
from nslora_dist.calibration.entries import Entries, Sums, traces
from nslora_dist.calibration.grams import NONE_BAD, Collector, GroupSums
from nslora_dist.calibration.parts import AGAIN, Parts
from nslora_dist.calibration.solve import Solution, solve_group
from nslora_dist.calibration.store import NullSpace
from nslora_dist.calibration.stream import BlockStream, Texts
from nslora_dist.calibration_data import CalibrationTexts, text_batches
from nslora_dist.errors import Preempted, UserError
from nslora_dist.frozen import FrozenLinear
from nslora_dist.input_groups import InputGroup
from nslora_dist.recipe_adapter import AdapterSection
from nslora_dist.recipe_data import CalibrationSection
from nslora_dist.triangle import pack_triangle, unpack_triangle


@dataclass
class Pending:
    """A block whose Grams are being solved: what is still needed of it."""

    number: int
    groups: list[InputGroup]
    sums: dict[str, Sums]
    solutions: "Future[dict[str, Solution]]"
    owners: dict[str, int]


class Calibration:
    """One calibration run: the accumulators of a block at a time, and what has been solved so far."""

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: BaseFiles,
        groups: Sequence[InputGroup],
        *,
        section: CalibrationSection,
        adapter: AdapterSection,
        device: torch.device,
        parts: Parts | None = None,
    ) -> None:
        """``model`` is empty; ``groups`` are the targets' input groups of all blocks; ``parts`` keeps done blocks."""
        self.stream = BlockStream(model, checkpoint, device=device, place=section.hidden_states)
        self.model = model
        self.groups = groups
        self.section = section
        self.adapter = adapter
        self.device = device
        self.parts = parts
        self.loads = [0.0] * dist.world_size()

    def run(self, texts: Sequence[CalibrationTexts]) -> NullSpace:
        """Goes through all blocks.

        Args:
            texts: sources first, then probes, each with all ranks' sequences.

        Returns:
            The null space, without its key and hashes.

        Raises:
            UserError: an activation is not finite; on every rank, naming module, text and row.
            Preempted: a rank was asked to stop; the blocks that are done are on disk, where there are ``parts``.
        """
        self.weights = {t.name: t.weight for t in texts if t.weight is not None}
        self.entries = Entries(self.weights)
        sources = [self._deal(t) for t in texts if t.weight is not None]
        self.heldout = [self._deal(t, heldout=True) for t in texts if t.weight is not None and t.heldout]
        self.probes = [self._deal(t) for t in texts if t.weight is None]
        self.stream.embed([*sources, *self.heldout, *self.probes])
        pending: Pending | None = None
        count = len(self.stream.blocks)
        bar = tqdm(range(count), desc="calibration", unit="block", disable=not dist.is_main())
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="solver") as thread:
            done = True
            for number in bar:
                watch.progress(f"block {number + 1} of {count}")
                if dist.stopping():
                    raise Preempted(f"calibration: stopped before block {number + 1} of {count}, as asked; {AGAIN}")
                self.stream.load(number)
                groups = self._of_block(number)
                # Widest first: dealt last, it would go to whoever has just got the narrow ones.
                owners = {g.name: self._owner(g) for g in sorted(groups, key=lambda g: -g.in_features)}
                part = self.parts.read(number) if done and self.parts is not None else None
                if part is not None:  # an earlier process has done this block
                    self.entries.take_up(part)
                    for text in (*sources, *self.heldout, *self.probes):
                        self.stream.run(number, text, Collector([], {}))
                    self.stream.release(number)
                    continue
                done = False
                sums, grams = self._sources(number, sources, groups, owners)
                if pending is not None:
                    self._finish(pending)
                mine = [group for group in groups if owners[group.name] == dist.rank()]
                future = thread.submit(self._solve, number, mine, grams, sums)
                pending = Pending(number, groups, sums, future, owners)
            if pending is not None:
                watch.progress(f"solving block {count} of {count}")
                self._finish(pending)
        self.entries.tell_fallbacks()
        tokens = {text.name: sum(len(s) for s in (*text.calibration, *text.heldout)) for text in texts}
        manifest = {
            "settings": {"rank": self.adapter.rank, "a_init": self.adapter.a_init, "form": self.adapter.form},
            "tokens": tokens,
            "groups": self.entries.groups,
            "modules": self.entries.modules,
        }
        return NullSpace(manifest=manifest, tensors=self.entries.tensors)

    def _deal(self, texts: CalibrationTexts, *, heldout: bool = False) -> Texts:
        size, rank, ranks = self.section.batch_size, dist.rank(), dist.world_size()
        sequences = texts.heldout if heldout else texts.calibration
        origins = (texts.origins[len(texts.calibration) :] if heldout else texts.origins)[: len(sequences)][rank::ranks]
        return Texts(
            texts.name,
            text_batches(sequences, batch_size=size, rank=rank, world_size=ranks),
            device=self.device,
            keep=self.stream.keep,
            place=texts.place,
            origins=[origins[start : start + size] for start in range(0, len(origins), size)],
        )

    def _of_block(self, number: int) -> list[InputGroup]:
        prefix = self.stream.blocks[number][0] + "."
        return [group for group in self.groups if group.name.startswith(prefix)]

    def _owner(self, group: InputGroup) -> int:
        """Who solves: rank 0, or the rank with the least work so far (a solve costs d³)."""
        if self.section.solver.placement == "rank0":
            return 0
        owner = min(range(len(self.loads)), key=self.loads.__getitem__)
        self.loads[owner] += float(group.in_features) ** 3
        return owner

    def _sources(
        self, number: int, sources: Sequence[Texts], groups: Sequence[InputGroup], owners: dict[str, int]
    ) -> tuple[dict[str, Sums], dict[str, dict[str, Tensor]]]:
        """All sources through the block, each one's Grams reduced to their owners behind the next one's forward pass.

        Returns:
            The sums by source, without Grams, and the owned groups' Grams by group and source.
        """
        sums: dict[str, Sums] = {}
        grams: dict[str, dict[str, Tensor]] = {g.name: {} for g in groups if owners[g.name] == dist.rank()}
        under_way: list[tuple[InputGroup, str, Tensor, Any]] = []
        for text in sources:
            sums[text.name] = self._pass(number, text, groups, {})
            self._receive(under_way, grams)
            for group in groups:
                total = sums[text.name][group.name]
                assert total.gram is not None
                # Triangles travel: half the bytes, and the full Gram is freed before the wire is waited for.
                sent = total.gram if dist.world_size() == 1 else pack_triangle(total.gram)
                total.gram = None
                under_way.append((group, text.name, sent, dist.start_reduce_to(sent, owner=owners[group.name])))
        self._receive(under_way, grams)
        return sums, grams

    def _receive(
        self, under_way: list[tuple[InputGroup, str, Tensor, Any]], grams: dict[str, dict[str, Tensor]]
    ) -> None:
        for group, source, sent, work in under_way:
            if work is not None:
                work.wait()
            if group.name in grams:
                whole = sent if dist.world_size() == 1 else unpack_triangle(sent)
                grams[group.name][source] = whole
        under_way.clear()

    def _pass(self, number: int, texts: Texts, groups: Sequence[InputGroup], bases: dict[str, Tensor]) -> Sums:
        """One set of texts through a block; energies are summed over ranks, Grams stay this rank's."""
        sums = {g.name: GroupSums(g, basis=bases.get(g.name), device=self.device) for g in groups}
        self.stream.run(number, texts, Collector(groups, sums))
        self._check_finite(texts, sums)
        for total in sums.values():
            total.finish()
            scalars = dist.all_reduce(torch.stack([total.energy, *total.outputs.values()]))
            total.energy = scalars[0]
            total.outputs = dict(zip(total.outputs, scalars[1:], strict=True))
        return sums

    def _check_finite(self, texts: Texts, sums: Sums) -> None:
        with dist.together("calibration"):
            for what, value in _suspects(sums):
                batch = int(value)
                if batch < NONE_BAD:
                    where = f", which begins in {' or '.join(texts.origins[batch])}" if texts.origins else ""
                    raise UserError(
                        f"{texts.place}: the {what} is not finite at a text of batch {batch} on rank {dist.rank()}"
                        f"{where}; check that text and the base's weights, or use base_model.dtype=float32"
                    )

    def _solve(
        self, number: int, groups: Sequence[InputGroup], grams: dict[str, dict[str, Tensor]], sums: dict[str, Sums]
    ) -> dict[str, Solution]:
        """The owned groups, one after the other, each one's Grams freed behind it; runs in the solver thread."""
        name, block = self.stream.blocks[number]  # not through the model, whose layers the main thread swaps
        solutions = {}
        for group in groups:
            weights = {s.name: _dense(block.get_submodule(s.name.removeprefix(f"{name}."))) for s in group.modules}
            solutions[group.name] = solve_group(
                grams.pop(group.name),
                weights,
                source_weights=self.weights,
                traces=traces(group, sums),
                adapter=self.adapter,
                section=self.section,
            )
        return solutions

    def _finish(self, pending: Pending) -> None:
        """Sends the solutions round, measures held-out texts and probes in the new bases, and frees the block."""
        found: dict[str, Solution] = {}
        with dist.together(f"solving block {pending.number}"):
            found = pending.solutions.result()
        for group in pending.groups:
            if group.name not in found:
                found[group.name] = Solution.empty(
                    group.in_features,
                    {shape.name: shape.out_features for shape in group.modules},
                    sources=len(pending.sums),
                    adapter=self.adapter,
                    device=self.device,
                )
            for tensor in found[group.name].tensors():
                if tensor.numel():
                    dist.broadcast(tensor, source=pending.owners[group.name])
            self.entries.solved(group, found[group.name], pending.sums)
        bases = {name: solution.basis for name, solution in found.items()}
        held = {text.name: self._pass(pending.number, text, pending.groups, bases) for text in self.heldout}
        probed = {text.name: self._pass(pending.number, text, pending.groups, bases) for text in self.probes}
        self.stream.release(pending.number)
        for group in pending.groups:
            self.entries.measured(group, held, probed)
        if self.parts is not None:
            self.parts.write(pending.number, self.entries.of_block(self.stream.blocks[pending.number][0]))


def _suspects(sums: Sums) -> Iterator[tuple[str, Tensor]]:
    """What a batch can have made non-finite, in the order of the forward pass: inputs, then products."""
    for name, total in sums.items():
        yield f"input of {name}", total.first_bad
        for module, batch in total.first_bad_output.items():
            yield f"output of {module}", batch


def _dense(module: torch.nn.Module) -> Tensor:
    assert isinstance(module, FrozenLinear)
    return module.dense(module.weight)
