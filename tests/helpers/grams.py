"""The Grams of all groups at once, from plain forward passes: what the streamed calibration pass is held against."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from nslora_dist.batches import Batch
from nslora_dist.calibration.grams import Collector, GroupSums, real_on
from nslora_dist.input_groups import InputGroup


@torch.no_grad()
def whole_model_grams(
    model: nn.Module, forward: Any, groups: Sequence[InputGroup], batches: Iterable[Batch], *, device: torch.device
) -> dict[str, GroupSums]:
    """The Grams of all groups from plain forward passes of a live model, sharded or not.

    Args:
        model: where the groups' modules are found by name.
        forward: runs one ``Batch`` through the model.
        groups: what to collect.
        batches: this rank's share; a sharded model needs the same number on every rank.
        device: where the sums live.

    Returns:
        This rank's sums by group name, to be reduced over ranks.
    """
    sums = {group.name: GroupSums(group, basis=None, device=device) for group in groups}
    collector = Collector(groups, sums)
    with collector.attached(model):
        for number, batch in enumerate(batches):
            collector.start_batch(number, real_on(device, batch))
            forward(batch.to(device))
    for total in sums.values():
        total.finish()
    return sums
