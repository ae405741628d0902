"""Log-likelihoods and greedy continuations of token rows by the engine's own model, however it is sharded.

Every rank calls these with the same rows and gets all results. Rows are dealt out in turns, longest first; in each turn
every rank runs the same number of forward passes, with a row that only fills up where it has none, for under FSDP2 and
ZeRO-3 every pass gathers weights from all ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import DynamicCache

from nslora_dist import dist, watch
from nslora_dist.batches import IGNORED, filler, pad_right
from nslora_dist.engines import Engine
from nslora_dist.supervised import Continued, Offered, Scored

T = TypeVar("T")
Tokens = Sequence[int] | np.ndarray

STOP_EVERY = 16
"""New tokens between two looks whether the ranks were asked to stop."""


def log_likelihoods(
    engine: Engine,
    rows: Sequence[tuple[Tokens, int]],
    *,
    batch_size: int,
    pad: int,
    device: torch.device,
    name: str,
) -> list[tuple[float, bool]]:
    """Of each row's last tokens given those before them, in one pass a batch; collective.

    Rows that differ in their last token alone, as a question's answers A to D, are one row with several ends.

    Args:
        engine: the model.
        rows: the tokens, and how many of them at the end are scored: at least one, and fewer than there are.
        batch_size: rows a pass and rank.
        pad: the token to fill up with.
        device: this rank's.
        name: for logs and messages.

    Returns:
        Σ log p, and whether greedy decoding would have given those tokens.

    Raises:
        Preempted: a rank was asked to stop.
    """

    def score(mine: list[tuple[Tokens, int]]) -> list[tuple[float, bool]]:
        if not mine:
            batch = filler(pad)
        else:
            ids, mask = pad_right([torch.tensor(tokens, dtype=torch.int64) for tokens, _ in mine], pad)
            labels = torch.full_like(ids, IGNORED)
            for row, (tokens, scored) in enumerate(mine):
                labels[row, len(tokens) - scored : len(tokens)] = ids[row, len(tokens) - scored : len(tokens)]
            batch = Scored(ids, mask, None, labels)
        found = engine.matches(batch.to(device))
        return [(sum_, greedy == 1.0) for sum_, greedy in dist.numbers(found)] if mine else []

    def offer(mine: list[tuple[Tokens, list[int]]]) -> list[list[tuple[float, bool]]]:
        if not mine:
            engine.matches(filler(pad).to(device))
            return []
        ids, mask = pad_right([torch.tensor(tokens, dtype=torch.int64) for tokens, _ in mine], pad)
        most = max(len(ends) for _, ends in mine)
        options = torch.tensor([ends + [IGNORED] * (most - len(ends)) for _, ends in mine])
        batch = Offered(ids, mask, None, torch.full_like(ids, IGNORED), options=options)
        found = dist.numbers(engine.matches(batch.to(device)))
        return [
            [(sum_, greedy == 1.0) for sum_, greedy in row[: len(ends)]]
            for row, (_, ends) in zip(found, mine, strict=True)
        ]

    in_turns: dict[str, Any] = {"key": lambda row: len(row[0]), "batch_size": batch_size, "name": name}
    alike: dict[bytes, list[int]] = {}
    for number, (tokens, scored) in enumerate(rows):
        if scored == 1:  # bytes: of the tens of thousands of rows of a task, tuples of numbers would fill a node
            alike.setdefault(np.asarray(tokens[:-1], np.int64).tobytes(), []).append(number)
    shared = [numbers for numbers in alike.values() if len(numbers) > 1]
    together = {number for numbers in shared for number in numbers}
    alone = [number for number in range(len(rows)) if number not in together]
    answers = dict(zip(alone, _in_turns([rows[number] for number in alone], score, **in_turns), strict=True))
    offered = [(rows[numbers[0]][0][:-1], [int(rows[number][0][-1]) for number in numbers]) for numbers in shared]
    for numbers, found in zip(shared, _in_turns(offered, offer, **in_turns), strict=True):
        answers |= zip(numbers, found, strict=True)
    return [answers[number] for number in range(len(rows))]


def continuations(
    engine: Engine,
    rows: Sequence[Tokens],
    *,
    ends: Callable[[list[int]], bool],
    most: int,
    batch_size: int,
    pad: int,
    device: torch.device,
    name: str,
) -> list[list[int]]:
    """Greedy decoding with a key-value cache; collective.

    One pass over the prompts and one pass a token, in which a sharded engine without room to keep them
    (``Engine.whole``) gathers every weight: at 70B in bfloat16 that is 141 GB received by each rank for each token of a
    batch, so batches should be as large as the cache allows (LLaMA 3 70B keeps 320 KiB a token and row, 8B 128 KiB). A
    batch goes on until all its rows have ended.

    Args:
        engine: the model.
        rows: the prompts, none empty.
        ends: whether the new tokens are enough; asked after each.
        most: new tokens a row.
        batch_size: rows a pass and rank.
        pad: the token to fill up with.
        device: this rank's.
        name: for logs and messages.

    Returns:
        The new tokens.

    Raises:
        Preempted: a rank was asked to stop.
    """

    def decode(mine: list[Tokens]) -> list[list[int]]:
        prompts: list[Tokens] = mine or [[pad, pad]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(row)) + [*map(int, row)] for row in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
        cache = DynamicCache(config=engine.model.config)
        new: list[list[int]] = [[] for _ in mine]
        done = [False] * len(mine)
        for count in range(most):
            if count and dist.everywhere(all(done)):
                break
            if count % STOP_EVERY == STOP_EVERY - 1:
                dist.stop_if_asked(f"evaluation: stopped in {name}")
            positions = (mask.cumsum(1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
            ids = engine.matches(Continued(ids, mask, positions, ids, cache=cache))[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            for row, token in enumerate(dist.numbers(ids[: len(mine), 0])):
                if not done[row]:
                    new[row].append(token)
                    done[row] = ends(new[row])
            watch.progress(f"{name}, {count + 1} new tokens")
        return new

    return _in_turns(rows, decode, key=len, batch_size=batch_size, name=name)


def _in_turns(
    rows: Sequence[Any], work: Callable[[list[Any]], list[T]], *, key: Callable[[Any], int], batch_size: int, name: str
) -> list[T]:
    """``work`` on this rank's batch of every turn, and all ranks' results in the order of ``rows``."""
    order = sorted(range(len(rows)), key=lambda number: -key(rows[number]))
    turns = range(-(-len(order) // (batch_size * dist.world_size())))

    def batch(turn: int, rank: int) -> list[int]:
        start = (turn * dist.world_size() + rank) * batch_size
        return order[start : start + batch_size]

    mine: list[T] = []
    for turn in turns:
        dist.stop_if_asked(f"evaluation: stopped in {name}")
        watch.progress(f"{name}, batch {turn + 1} of {len(turns)}")
        mine += work([rows[number] for number in batch(turn, dist.rank())])
    found: list[Iterator[T]] = [iter(part) for part in dist.gather(mine)]
    by_number = {
        number: next(found[rank]) for turn in turns for rank in range(len(found)) for number in batch(turn, rank)
    }
    return [by_number[number] for number in range(len(rows))]
