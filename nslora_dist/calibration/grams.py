"""Gram matrices of input groups, summed by forward hooks (docs/methods.md §1.1).

Two kinds of sums run over the real tokens of a batch: the full Gram X Xᵀ of a group, and, once a basis U is known, the
small one Uᵀ X Xᵀ U. Beside either, Σ‖W x‖² of every module is read off its output, so that tr(W G Wᵀ) costs no product
with a weight.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nslora_dist.adapter import energy_of
from nslora_dist.batches import Places
from nslora_dist.frozen import FrozenLinear
from nslora_dist.input_groups import InputGroup

LEAF = {"cpu": 128, "cuda": 2048}
"""A Gram is symmetric, so its triangle is halved until the tiles on the diagonal, computed whole, are this small.

A CPU's kernels are near their rate at 128; a GPU needs a few hundred output tiles of its own in each product.
"""


NONE_BAD = 2**62
"""No batch had a value that is not finite."""


class GroupSums:
    """Sums over tokens for one input group and one set of texts.

    Attributes:
        gram: (d_in, d_in) float32, only the lower block triangle filled until ``finish``; None in a projected pass.
        update_gram: (r, r) float32 Σ z zᵀ with z = Uᵀ x; None in a full pass.
        energy: () float64 Σ‖x‖².
        outputs: module name → () float64 Σ‖W x‖².
        first_bad: () int64, the first batch with a non-finite input; ``NONE_BAD`` while there is none.
        first_bad_output: the same for the product of each module, whose weight may be at fault.
    """

    def __init__(self, group: InputGroup, *, basis: Tensor | None, device: torch.device) -> None:
        """Starts at zero; with ``basis`` (d_in, r) the sums are projected ones."""
        size = group.in_features if basis is None else basis.shape[1]
        total = torch.zeros(size, size, dtype=torch.float32, device=device)
        self.basis = basis
        self.gram = total if basis is None else None
        self.update_gram = None if basis is None else total
        self.energy = torch.zeros((), dtype=torch.float64, device=device)
        self.outputs = {m.name: torch.zeros((), dtype=torch.float64, device=device) for m in group.modules}
        self.first_bad = torch.full((), NONE_BAD, dtype=torch.int64, device=device)
        self.first_bad_output = {m.name: self.first_bad.clone() for m in group.modules}

    def add_input(self, x: Tensor, *, batch: int) -> None:
        """Adds (n, d_in) inputs of one batch."""
        energy = energy_of(x)
        self.energy += energy
        self.first_bad = _first_bad(self.first_bad, energy, batch)
        if self.gram is not None:
            add_gram(self.gram, x)
        else:
            assert self.basis is not None and self.update_gram is not None
            z = x.float() @ self.basis
            self.update_gram.addmm_(z.T, z)

    def add_output(self, module: str, y: Tensor, *, batch: int) -> None:
        """Adds (n, d_out) products W x of one batch, without a bias."""
        energy = energy_of(y)
        self.outputs[module] += energy
        self.first_bad_output[module] = _first_bad(self.first_bad_output[module], energy, batch)

    def finish(self) -> None:
        """Mirrors the lower block triangle of the Gram into the upper one."""
        if self.gram is not None:
            mirror(self.gram)


def _tiles(start: int, stop: int, leaf: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of tiles that cover the lower triangle: large squares first, ``leaf`` wide on the diagonal."""
    if stop - start <= leaf:
        yield slice(start, stop), slice(start, stop)
        return
    middle = (start + stop) // 2
    yield slice(middle, stop), slice(start, middle)
    yield from _tiles(start, middle, leaf)
    yield from _tiles(middle, stop, leaf)


def _leaf(gram: Tensor) -> int:
    return LEAF.get(gram.device.type, LEAF["cuda"])


def add_gram(gram: Tensor, x: Tensor) -> None:
    """gram += Xᵀ X for rows x (n, d), in the lower block triangle of ``gram`` (d, d) float32 alone.

    bfloat16 products are exact in float32, so on a GPU they go through the matrix units with float32 sums; everywhere
    else the inputs are widened first.
    """
    native = x.is_cuda and x.dtype == torch.bfloat16
    x = x if native else x.float()
    for rows, columns in _tiles(0, len(gram), _leaf(gram)):
        if native:
            gram[rows, columns] += torch.mm(x[:, rows].T, x[:, columns], out_dtype=torch.float32)
        else:
            gram[rows, columns].addmm_(x[:, rows].T, x[:, columns])


def mirror(gram: Tensor) -> None:
    """Copies the lower block triangle that ``add_gram`` filled onto the upper one, in place, tile by tile."""
    for rows, columns in _tiles(0, len(gram), _leaf(gram)):
        if rows != columns:
            gram[columns, rows] = gram[rows, columns].T


def _first_bad(so_far: Tensor, energy: Tensor, batch: int) -> Tensor:
    # Nothing is read back here: a GPU would wait for every module.
    return torch.minimum(so_far, torch.where(energy.isfinite(), NONE_BAD, batch))


class Collector:
    """Forward hooks that feed one ``GroupSums`` per group while batches run through a block."""

    def __init__(self, groups: Sequence[InputGroup], sums: dict[str, GroupSums]) -> None:
        """Collects for ``groups`` into ``sums`` (by group name)."""
        self.groups = groups
        self.sums = sums
        self.real: Places | None = None
        self.batch = 0

    def start_batch(self, number: int, real: Places | None) -> None:
        """Says which batch runs next, and which of its tokens are summed, on the model's device; None for all."""
        self.batch = number
        self.real = real

    @contextmanager
    def attached(self, block: nn.Module, *, prefix: str) -> Iterator[None]:
        """Hooks onto the groups' linears, all of them in ``block``, the model's part named ``prefix``, while open."""
        hooks = []
        watched: list[FrozenLinear] = []
        for group in self.groups:
            for position, shape in enumerate(group.modules):
                linear = block.get_submodule(shape.name.removeprefix(f"{prefix}."))
                assert isinstance(linear, FrozenLinear), shape.name
                if position == 0:
                    hooks.append(linear.register_forward_pre_hook(self._input_hook(group.name)))
                linear.watch = functools.partial(self._add_output, group.name, shape.name)
                watched.append(linear)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for frozen in watched:
                frozen.watch = None

    def _input_hook(self, group: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.sums[group].add_input(self._tokens(args[0]), batch=self.batch)

        return hook

    def _add_output(self, group: str, name: str, product: Tensor) -> None:
        self.sums[group].add_output(name, self._tokens(product), batch=self.batch)

    def _tokens(self, x: Tensor) -> Tensor:
        """(b, s, d) → (n, d) of the real tokens."""
        return x.flatten(0, 1) if self.real is None else x[self.real]
