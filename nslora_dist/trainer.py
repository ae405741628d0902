"""The only training loop; it knows engines by their Protocol alone."""

import logging
import math
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nslora_dist import dist, watch
from nslora_dist.adapter import Adapter, adapted_linears
from nslora_dist.budget import Budget
from nslora_dist.calibration.store import MIXTURE
from nslora_dist.checkpoint import Checkpoints
from nslora_dist.data import Batch, TrainingData
from nslora_dist.effects import live_interference
from nslora_dist.engines import Engine
from nslora_dist.errors import Preempted, UserError
from nslora_dist.recipe import TrainSection
from nslora_dist.report import Scalars

log = logging.getLogger("nslora_dist")


@dataclass
class Trained:
    """What a training run measured.

    Attributes:
        losses: one an optimizer step; None where it was not finite.
        grad_norms: the same of the gradient's norm before clipping.
        updates: steps that were not skipped, AdamW's count.
        tokens: real tokens of all ranks.
        seconds: in the loop, of every process that worked on it.
        skipped: the steps that changed nothing, because their loss or gradient was not finite.
    """

    losses: list[float | None] = field(default_factory=list)
    grad_norms: list[float | None] = field(default_factory=list)
    updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: list[int] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens of all ranks a second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def skipped_in_a_row(self) -> int:
        """How many of the last steps were skipped."""
        last, count = len(self.losses) - 1, 0
        while count < len(self.skipped) and self.skipped[-1 - count] == last - count:
            count += 1
        return count


def learning_rate(step: int, *, total: int, train: TrainSection) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``total``: linear warm-up, then cosine, linear or constant."""
    warmup = math.ceil(train.warmup_ratio * total)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    match train.schedule:
        case "cosine":
            return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear":
            return train.learning_rate * (1.0 - progress)
        case "constant":
            return train.learning_rate


def train(
    engine: Engine,
    data: TrainingData,
    section: TrainSection,
    *,
    device: torch.device,
    scalars: Scalars,
    checkpoints: Checkpoints | None = None,
    budget: Budget | None = None,
    description: str = "training",
) -> Trained:
    """Runs ``data.total_steps`` optimizer steps, or those that a checkpoint leaves to do.

    The loss is weighted by token: each micro-batch's sum is divided by the supervised tokens of the whole global batch,
    over all ranks, so neither the number of ranks nor of micro-batches changes it.

    Raises:
        UserError: so many losses or gradients in a row were not finite as ``train.stop_after_skipped`` says; on every
            rank, naming step, module and micro-batch.
        Preempted: a rank was asked to stop; the state is on disk, where there are checkpoints.
    """
    result = Trained() if checkpoints is None else Trained(**checkpoints.restore(engine))
    modules = adapted_linears(engine.model).values()
    first, total = len(result.losses), data.total_steps
    bar = tqdm(
        range(first, total), desc=description, unit="step", initial=first, total=total, disable=not dist.is_main()
    )
    started = time.perf_counter() - result.seconds
    where = ""
    for step in bar:
        _seed(section.seed, step)
        batches = data.micro_batches(step, rank=dist.rank(), world_size=dist.world_size())
        logged = step % section.log_every == 0 or step == total - 1
        summed = _forward_and_backward(
            engine, batches, modules=modules if logged else (), place=f"step {step + 1} of {total}", device=device
        )
        if summed is None:
            raise Preempted(_leave(engine, result, checkpoints, description=description, total=total))
        loss, seen = summed
        rate = learning_rate(step, total=total, train=section)
        norm = math.nan
        if math.isfinite(loss):
            norm = engine.step(rate)
        else:
            where = where or _blame(engine, data, batches, device=device)
            engine.skip()
        result.losses.append(loss if math.isfinite(loss) else None)
        result.grad_norms.append(norm if math.isfinite(norm) else None)
        result.tokens += seen
        result.seconds = time.perf_counter() - started
        if not math.isfinite(norm):
            result.skipped.append(step)
            _skipped(result, where, section=section, checkpoints=checkpoints)
            continue
        result.updates += 1
        where = ""
        kept = None if budget is None else budget.enforce()  # before anything reads or keeps what the step made
        if checkpoints is not None:
            checkpoints.settle()
            if checkpoints.due(step + 1):
                checkpoints.start(engine, step + 1, asdict(result))
        if logged:
            values = {"train/loss": loss, "train/learning_rate": rate, "train/grad_norm": norm}
            values["train/tokens_per_second"] = result.tokens_per_second
            values |= {} if kept is None else kept.tags()
            interference = _numbers(live_interference(engine))  # of B before this step, as its forward pass saw it
            if dist.is_main():
                scalars.add(step, values | _interference_tags(interference))
            most = f" interference {max(interference[MIXTURE].values()):.3f}" if MIXTURE in interference else ""
            bar.set_postfix_str(f"loss {loss:.4f}{most}")
    if checkpoints is not None:
        checkpoints.write(engine, total, asdict(result), good=not result.skipped_in_a_row)
    return result


def _seed(seed: int, step: int) -> None:
    """Whatever draws random numbers in a step (dropout in attention) draws the same ones when it is done again."""
    torch.manual_seed(zlib.crc32(f"{seed}/{step}/{dist.rank()}".encode()))


def _forward_and_backward(
    engine: Engine,
    batches: Sequence[Batch],
    *,
    modules: Iterable[Adapter],
    place: str,
    device: torch.device,
) -> tuple[float, int] | None:
    """A global batch's gradients; ``modules`` measure their interference in its first forward pass.

    Returns:
        Its loss a supervised token, and its real tokens, over all ranks; None where a rank was asked to stop: then
        what was accumulated is incomplete, and the parameters are those of the last step.

    Raises:
        UserError: no token of it is scored.
    """
    counts = [sum(b.supervised_tokens for b in batches), sum(b.token_count for b in batches)]
    supervised, seen = dist.numbers(dist.all_reduce(torch.tensor(counts, dtype=torch.float64, device=device)))
    if not supervised:
        raise UserError(f"training, {place}: none of its tokens is scored; raise data.max_length")
    summed = torch.zeros((), dtype=torch.float64, device=device)
    for number, batch in enumerate(batches):
        watch.progress(f"{place}, micro-batch {number + 1} of {len(batches)}")
        if dist.stopping():
            return None
        for module in modules:  # the numbers that its forward pass leaves are read when the step is done
            module.measure = number == 0
        nll = engine.forward(batch.to(device))
        summed += nll.detach()
        # Engines average gradients over ranks; the sum over tokens is wanted.
        engine.backward(nll * (dist.world_size() / supervised))
    for module in modules:
        module.measure = False
    return dist.numbers(dist.all_reduce(summed)) / supervised, int(seen)


def _leave(engine: Engine, result: Trained, checkpoints: Checkpoints | None, *, description: str, total: int) -> str:
    """Puts the state of the last whole step on disk; what there is to say about it."""
    step = len(result.losses)
    if checkpoints is None:
        kept = watch.continues_from()
    elif step == 0:
        kept = "the beginning"
    else:
        # Behind a skipped step nobody knows yet whether the state is good: older ones stay beside it.
        kept = str(checkpoints.write(engine, step, asdict(result), good=not result.skipped_in_a_row))
    return f"{description}: stopped after step {step} of {total}, as asked; the same command continues from {kept}"


def _skipped(result: Trained, where: str, *, section: TrainSection, checkpoints: Checkpoints | None) -> None:
    """Says that a step was skipped, and ends the run where too many were, at the last checkpoint before them."""
    if checkpoints is not None:
        checkpoints.abandon(result.skipped[-1])  # the state after which nothing was finite is not known to be good
    step, count, loss = result.skipped[-1] + 1, result.skipped_in_a_row, result.losses[-1]
    what = f"loss is not finite (first at {where})" if loss is None else f"gradient is not finite (loss {loss:.4g})"
    if count < section.stop_after_skipped:
        if dist.is_main():
            log.warning("training: step %d is skipped, its %s; %d in a row", step, what, count)
        return
    since = f"step {step}: its" if count == 1 else f"step {step - count + 1} and the {count - 1} after it: the"
    saved = None if checkpoints is None else checkpoints.last
    if saved is None:
        kept = ""
    elif saved > step - count:  # where the job was stopped among them
        kept = f"; {watch.continues_from()} was written among them: move it away to go on from an older one"
    else:
        kept = f"; the last good state is {watch.continues_from()}"
    raise UserError(
        f"training, {since} {what}; lower train.learning_rate, use base_model.dtype=float32, or mend those rows{kept}"
    )


def _numbers(found: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """What is on the device, asked for once a name: there are hundreds of modules."""
    return {
        name: dict(zip(values, torch.stack([*values.values()]).tolist(), strict=True)) for name, values in found.items()
    }


def _interference_tags(found: dict[str, dict[str, float]]) -> dict[str, float]:
    tags: dict[str, float] = {}
    for name, numbers in found.items():
        if name == MIXTURE:
            tags |= {f"interference_per_module/{module}": value for module, value in numbers.items()}
        tags[f"interference/{name}_max"] = max(numbers.values())
        tags[f"interference/{name}_rms"] = math.sqrt(sum(value * value for value in numbers.values()) / len(numbers))
        tags[f"interference/{name}_mean"] = sum(numbers.values()) / len(numbers)
    return tags


def _blame(engine: Engine, data: TrainingData, batches: Sequence[Batch], *, device: torch.device) -> str:
    """Runs the step's micro-batches once more to say where the first non-finite value came up."""
    found: list[tuple[int, str, int]] = []

    def watch(name: str, number: int) -> object:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                rows = ~output.flatten(1).isfinite().all(1) if output.dim() == 3 else torch.ones(1)
                found.append((number, name, int(rows.int().argmax())))

        return hook

    for number, batch in enumerate(batches):
        hooks = [m.register_forward_hook(watch(name, number)) for name, m in engine.model.named_modules() if name]
        try:
            engine.matches(batch.to(device))
        finally:
            for hook in hooks:
                hook.remove()
    mine = None
    if found:
        number, name, row = found[0]
        samples = batches[number].samples
        which = f", data.path {', '.join(map(data.place, samples[row]))}" if row < len(samples) else ""
        mine = f"rank {dist.rank()}, micro-batch {number}, row {row}, module {name}{which}"
    return next((place for place in dist.gather(mine) if place is not None), "the loss alone")
