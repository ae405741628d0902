"""What a calibration pass puts into the artifact: solutions, measured texts, references; block by block."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nslora_dist import dist
from nslora_dist.calibration.grams import GroupSums
from nslora_dist.calibration.parts import Part
from nslora_dist.calibration.solve import Solution
from nslora_dist.calibration.store import MIXTURE
from nslora_dist.errors import UserError
from nslora_dist.input_groups import InputGroup

log = logging.getLogger("nslora_dist")

Sums = dict[str, GroupSums]
"""Group → what one set of texts summed up to."""


def traces(group: InputGroup, sums: Mapping[str, Sums]) -> dict[str, float]:
    """Source → tr(G_s) = Σ‖x‖² over all ranks.

    Raises:
        UserError: a source gives the group nothing but zeros.
    """
    found = {name: float(total[group.name].energy) for name, total in sums.items()}
    if min(found.values()) <= 0.0:
        silent = min(found, key=found.__getitem__)
        raise UserError(f"calibration.sources.{silent}: every input of {group.name} is zero; check its texts")
    return found


class Entries:
    """The artifact as far as it has come.

    Attributes:
        tensors: as in ``store.py``, float32 on the CPU; on rank 0 alone.
        groups: group → its entry in the manifest.
        modules: module → its entry.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """``weights`` are those of the sources (docs/methods.md §1d)."""
        self.weights = weights
        self.tensors: dict[str, Tensor] = {}
        self.groups: dict[str, Any] = {}
        self.modules: dict[str, Any] = {}

    def solved(self, group: InputGroup, solution: Solution, sums: Mapping[str, Sums]) -> None:
        """Puts in what the owner found, and the sources' energies.

        Args:
            group: the group.
            solution: sent to every rank.
            sums: source → its sums over all ranks.
        """
        self._keep(f"{group.name}.basis", solution.basis)
        self._keep(f"{group.name}.eigenvalues", solution.eigenvalues)
        if solution.spectrum.numel():
            self._keep(f"{group.name}.spectrum", solution.spectrum)
        for number, name in enumerate((*sums, MIXTURE)):
            self._keep(f"{group.name}.update_gram.{name}", solution.update_grams[number])
        for name, b in solution.start_b.items():
            self._keep(f"{name}.start_B", b)
        energies = traces(group, sums)
        self.groups[group.name] = {
            "modules": [shape.name for shape in group.modules],
            "in_features": group.in_features,
            "fell_back_to_eigh": bool(solution.fell_back),
            "leak": {"calibration": float(solution.leak), "heldout": None, "random": float(solution.random_leak)},
        }
        for number, shape in enumerate(group.modules):
            if len(solution.mixes):
                self._keep(f"{shape.name}.mix", solution.mixes[number])
            references = {name: float(total[group.name].outputs[shape.name]) for name, total in sums.items()}
            references[MIXTURE] = self._mixed(references, energies)
            if dist.is_main() and not references[MIXTURE] > 0:
                log.warning(
                    "calibration: %s puts out nothing but zeros, so there is nothing to measure its update against: "
                    "figures of interference leave it out",
                    shape.name,
                )
            self.modules[shape.name] = {
                "group": group.name,
                "out_features": shape.out_features,
                "mixed": bool(len(solution.mixes)),
                "has_start_b": shape.name in solution.start_b,
                "references": references,
            }

    def measured(self, group: InputGroup, heldout: Mapping[str, Sums], probes: Mapping[str, Sums]) -> None:
        """Puts in the probes' small Grams and energies, and the held-out leak; collective.

        Args:
            group: the group.
            heldout: source → its held-out texts' sums, the small Grams this rank's alone.
            probes: the same of every probe.
        """
        for name, total in probes.items():
            small = total[group.name].update_gram
            assert small is not None
            self._keep(f"{group.name}.update_gram.{name}", dist.all_reduce(small))
            for module, energy in total[group.name].outputs.items():
                self.modules[module]["references"][name] = float(energy)
        leaks = {}
        for name, total in heldout.items():
            small = total[group.name].update_gram
            assert small is not None
            leaks[name] = float(dist.all_reduce(small.diagonal().sum()) / total[group.name].energy)
        if leaks:
            whole = sum(self.weights[name] for name in leaks)
            mean = sum(self.weights[name] * value for name, value in leaks.items()) / whole
            self.groups[group.name]["leak"]["heldout"] = mean

    def tell_fallbacks(self) -> None:
        """Says which groups the fast solver gave up on, for they took many times its time; rank 0 alone."""
        fallen = [name for name, entry in self.groups.items() if entry["fell_back_to_eigh"]]
        if fallen and dist.is_main():
            log.warning(
                "calibration: %d of %d groups were solved by eigh, many times as long, for the fast solver did not "
                "meet its own bounds there (the first is %s); the null spaces are as good%s",
                len(fallen),
                len(self.groups),
                fallen[0],
                # For a few it would put all others on the slow solver.
                ". For another calibration of this base calibration.solver.method=eigh saves the attempts"
                if 2 * len(fallen) > len(self.groups)
                else "",
            )

    def of_block(self, block: str) -> Part:
        """What there is of the block of this name."""
        groups, modules, tensors = (
            {name: value for name, value in of.items() if name.startswith(f"{block}.")}
            for of in (self.groups, self.modules, self.tensors)
        )
        return Part({"groups": groups, "modules": modules}, tensors)

    def take_up(self, part: Part) -> None:
        """Puts in a block that an earlier process has done."""
        self.groups |= part.entries["groups"]
        self.modules |= part.entries["modules"]
        self.tensors |= part.tensors

    def _mixed(self, values: Mapping[str, float], energies: Mapping[str, float]) -> float:
        """A quadratic sum of the mixture from its sources', weighed as in ``mix_grams`` (docs/methods.md §1d)."""
        mean, whole = sum(energies.values()) / len(energies), sum(self.weights.values())
        return sum(self.weights[name] / whole * mean / energies[name] * value for name, value in values.items())

    def _keep(self, name: str, value: Tensor) -> None:
        if dist.is_main():
            self.tensors[name] = value.to("cpu", torch.float32).contiguous().clone()
