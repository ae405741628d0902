"""From texts and checkpoint to the null space, block by block (METHODS.md §1.1 to §1.3, §1c, §1d)."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from nslora_dist import dist
from nslora_dist.base_files import Checkpoint
from nslora_dist.base_model import FrozenLinear, InputGroup
from nslora_dist.calibration.grams import Collector, GroupSums
from nslora_dist.calibration.store import MIXTURE, NullSpace
from nslora_dist.calibration.stream import BlockStream, Texts
from nslora_dist.calibration_data import CalibrationTexts, text_batches
from nslora_dist.errors import UserError
from nslora_dist.null_space import leak, null_basis, projected_init, random_leak
from nslora_dist.recipe import AdapterSection, CalibrationSection

log = logging.getLogger(__name__)

SPECTRUM_WIDTH = 2048
"""Up to this width the whole spectrum is computed for the report's plot; it costs one more eigenvalue solve."""


class Calibration:
    """One calibration run: the accumulators of a block at a time, and what has been solved so far."""

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        groups: Sequence[InputGroup],
        *,
        section: CalibrationSection,
        adapter: AdapterSection,
        device: torch.device,
    ) -> None:
        """``model`` is empty; ``groups`` are the targets' input groups of all blocks."""
        self.stream = BlockStream(model, checkpoint, device=device, place=section.hidden_states)
        self.model = model
        self.groups = groups
        self.section = section
        self.adapter = adapter
        self.device = device
        self.tensors: dict[str, Tensor] = {}
        self.group_entries: dict[str, Any] = {}
        self.module_entries: dict[str, Any] = {}
        self.loads = [0.0] * dist.world_size()

    def run(self, texts: Sequence[CalibrationTexts]) -> NullSpace:
        """Goes through all blocks.

        Args:
            texts: sources first, then probes, each with all ranks' sequences.

        Returns:
            The null space, without its key and hashes.

        Raises:
            UserError: an activation is not finite; on every rank, naming module and sample.
        """
        sources = [self._deal(t.name, t.calibration) for t in texts if t.weight is not None]
        heldout = [self._deal(t.name, t.heldout) for t in texts if t.weight is not None and t.heldout]
        probes = [self._deal(t.name, t.calibration) for t in texts if t.weight is None]
        self.weights = {t.name: t.weight for t in texts if t.weight is not None}
        self.stream.embed([*sources, *heldout, *probes])
        numbers: Iterable[int] = range(len(self.stream.blocks))
        for number in tqdm(numbers, desc="calibration", unit="block", disable=not dist.is_main()):
            groups = self._of_block(number)
            with self.stream.block(number):
                sums = {text.name: self._pass(text, groups, {}) for text in sources}
                bases = {group.name: self._solve(group, sums) for group in groups}
                held = {text.name: self._pass(text, groups, bases) for text in heldout}
                probed = {text.name: self._pass(text, groups, bases) for text in probes}
                for group in groups:
                    self._record(group, bases[group.name], sums, held, probed)
        tokens = {text.name: sum(len(s) for s in (*text.calibration, *text.heldout)) for text in texts}
        manifest = {
            "settings": {"rank": self.adapter.rank, "a_init": self.adapter.a_init, "form": self.adapter.form},
            "tokens": tokens,
            "groups": self.group_entries,
            "modules": self.module_entries,
        }
        return NullSpace(manifest=manifest, tensors=self.tensors)

    def _deal(self, name: str, sequences: Sequence[Tensor]) -> Texts:
        batches = text_batches(
            sequences, batch_size=self.section.batch_size, rank=dist.rank(), world_size=dist.world_size()
        )
        return Texts(name, batches, device=self.device, keep=self.stream.keep)

    def _of_block(self, number: int) -> list[InputGroup]:
        prefix = self.stream.blocks[number][0] + "."
        return [group for group in self.groups if group.name.startswith(prefix)]

    def _pass(
        self, texts: Texts, groups: Sequence[InputGroup], bases: dict[str, Tensor]
    ) -> dict[str, GroupSums]:
        """One set of texts through the current block; energies are summed over ranks, Grams stay this rank's."""
        sums = {g.name: GroupSums(g, basis=bases.get(g.name), device=self.device) for g in groups}
        collector = Collector(groups, sums)
        with collector.attached(self.model):
            self.stream.run(texts, collector)
        self._check_finite(texts, sums)
        for total in sums.values():
            total.finish()
            scalars = dist.all_reduce(torch.stack([total.energy, *total.outputs.values()]))
            total.energy = scalars[0]
            total.outputs = dict(zip(total.outputs, scalars[1:], strict=True))
        return sums

    def _check_finite(self, texts: Texts, sums: dict[str, GroupSums]) -> None:
        with dist.together("calibration"):
            for name, total in sums.items():
                batch = int(total.first_bad)
                if batch < 2**62:
                    first = (batch * self.section.batch_size) * dist.world_size() + dist.rank()
                    raise UserError(
                        f"calibration.sources/probes '{texts.name}': the input of {name} is not finite at sample {first} "
                        f"(rank {dist.rank()}, batch {batch}); check that text and the base's weights, or use "
                        "base_model.dtype=float32"
                    )

    def _solve(self, group: InputGroup, sums: dict[str, dict[str, GroupSums]]) -> Tensor:
        """The null basis of one group on every rank: mix, reduce to the owner, solve there, broadcast.

        The mixture is formed from local sums and summed over ranks, so the wire carries one Gram whatever the number
        of sources.
        """
        owner = self._owner(group)
        shares = self._shares(group, sums)
        mixed = torch.zeros_like(next(iter(sums.values()))[group.name].gram)
        for name, share in shares.items():
            mixed.add_(sums[name][group.name].gram, alpha=share)
        dist.reduce_to(mixed, owner=owner)
        rank, width = self.adapter.rank, group.in_features
        basis = torch.empty(width, rank, dtype=torch.float32, device=self.device)
        facts = torch.zeros(3 + rank, dtype=torch.float64, device=self.device)
        spectrum = torch.zeros(width, dtype=torch.float64, device=self.device) if width <= SPECTRUM_WIDTH else None
        with dist.together(f"solving {group.name}"):
            if dist.rank() == owner:
                found = null_basis(mixed, rank=rank, method=self.section.solver.method)
                basis = found.basis.float().contiguous()
                facts[0] = leak(mixed, basis)
                facts[1] = random_leak(mixed, rank=rank, seed=self.section.seed)
                facts[2] = float("fallback" in found.method)
                facts[3:] = found.eigenvalues
                if spectrum is not None:
                    spectrum = torch.linalg.eigvalsh(mixed.double())
        del mixed
        dist.broadcast(basis, source=owner)
        dist.broadcast(facts, source=owner)
        self._keep(f"{group.name}.basis", basis)
        self._keep(f"{group.name}.eigenvalues", facts[3:].float())
        if spectrum is not None:
            self._keep(f"{group.name}.spectrum", dist.broadcast(spectrum, source=owner).float())
        self.group_entries[group.name] = {
            "modules": [module.name for module in group.modules],
            "in_features": width,
            "fell_back_to_eigh": bool(facts[2]),
            "leak": {"calibration": float(facts[0]), "heldout": None, "random": float(facts[1])},
        }
        self._start(group, basis, owner)
        return basis

    def _owner(self, group: InputGroup) -> int:
        """Who solves: rank 0, or the rank with the least work so far (a solve costs d³)."""
        if self.section.solver.placement == "rank0":
            return 0
        owner = min(range(len(self.loads)), key=self.loads.__getitem__)
        self.loads[owner] += float(group.in_features) ** 3
        return owner

    def _shares(self, group: InputGroup, sums: dict[str, dict[str, GroupSums]]) -> dict[str, float]:
        """w_s / Σw · mean trace / tr(G_s): what one unit of source s counts in the mixture (METHODS.md §1d)."""
        traces = {name: float(total[group.name].energy) for name, total in sums.items()}
        if min(traces.values()) <= 0.0:
            silent = min(traces, key=traces.__getitem__)
            raise UserError(f"calibration.sources.{silent}: every input of {group.name} is zero; check its texts")
        mean, whole = sum(traces.values()) / len(traces), sum(self.weights.values())
        return {name: self.weights[name] / whole * mean / trace for name, trace in traces.items()}

    def _start(self, group: InputGroup, basis: Tensor, owner: int) -> None:
        """A₀ (as r × r in the basis) and B₀ of each module, from its weight on the group's owner."""
        rank, residual = self.adapter.rank, self.adapter.form == "residual"
        mixed = self.adapter.a_init == "projected"
        for shape in group.modules:
            if mixed:
                mix = torch.empty(rank, rank, dtype=torch.float32, device=self.device)
                b = torch.empty(shape.out_features if residual else 0, rank, dtype=torch.float32, device=self.device)
                if dist.rank() == owner:
                    module = self.model.get_submodule(shape.name)
                    assert isinstance(module, FrozenLinear)
                    a0, b0 = projected_init(module.dense(module.weight), basis)
                    mix = (a0.double() @ basis.double()).float()
                    b = b0.contiguous() if residual else b
                self._keep(f"{shape.name}.mix", dist.broadcast(mix, source=owner))
                if residual:
                    self._keep(f"{shape.name}.start_B", dist.broadcast(b, source=owner))
            self.module_entries[shape.name] = {
                "group": group.name,
                "out_features": shape.out_features,
                "mixed": mixed,
                "has_start_b": residual,
                "references": {},
            }

    def _record(
        self,
        group: InputGroup,
        basis: Tensor,
        sums: dict[str, dict[str, GroupSums]],
        held: dict[str, dict[str, GroupSums]],
        probed: dict[str, dict[str, GroupSums]],
    ) -> None:
        """Small Grams and output energies per source and probe, their mixture, and the held-out leak."""
        shares = self._shares(group, sums)
        mixture = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float32, device=self.device)
        for name, total in (*sums.items(), *probed.items()):
            found = total[group.name]
            if found.gram is not None:
                small = basis.T @ (found.gram @ basis)
                found.gram = None
            else:
                assert found.update_gram is not None
                small = found.update_gram
            dist.all_reduce(small)
            if name in shares:
                mixture.add_(small, alpha=shares[name])
            self._keep(f"{group.name}.update_gram.{name}", small)
            for module, energy in found.outputs.items():
                self.module_entries[module]["references"][name] = float(energy)
        self._keep(f"{group.name}.update_gram.{MIXTURE}", mixture)
        for shape in group.modules:
            references = self.module_entries[shape.name]["references"]
            references[MIXTURE] = sum(share * references[name] for name, share in shares.items())
        if held:
            leaks = {}
            for name, total in held.items():
                small = total[group.name].update_gram
                assert small is not None
                leaks[name] = float(dist.all_reduce(small.diagonal().sum()) / total[group.name].energy)
            whole = sum(self.weights[name] for name in leaks)
            mean = sum(self.weights[name] * value for name, value in leaks.items()) / whole
            self.group_entries[group.name]["leak"]["heldout"] = mean

    def _keep(self, name: str, value: Tensor) -> None:
        if dist.is_main():
            self.tensors[name] = value.to("cpu", torch.float32).contiguous()


