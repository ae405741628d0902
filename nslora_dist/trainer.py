"""The only training loop; it knows engines by their Protocol alone."""

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nslora_dist import dist
from nslora_dist.adapter import adapted_linears
from nslora_dist.calibration.store import MIXTURE
from nslora_dist.data import Batch, TrainingData
from nslora_dist.engines import Engine
from nslora_dist.errors import UserError
from nslora_dist.evaluate import live_interference
from nslora_dist.recipe import TrainSection
from nslora_dist.report import Scalars


@dataclass
class Trained:
    """What a training run measured: one loss and gradient norm per optimizer step."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Real tokens of all ranks a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


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
    description: str = "training",
) -> Trained:
    """Runs ``data.total_steps`` optimizer steps.

    The loss is weighted by token: each micro-batch's sum is divided by the supervised tokens of the whole global batch,
    over all ranks, so neither the number of ranks nor of micro-batches changes it.

    Raises:
        UserError: a loss or gradient that is not finite; on every rank, naming step, module and micro-batch.
    """
    result = Trained()
    rank, world = dist.rank(), dist.world_size()
    modules = adapted_linears(engine.model).values()
    bar = tqdm(range(data.total_steps), desc=description, unit="step", disable=not dist.is_main())
    started = time.perf_counter()
    for step in bar:
        batches = data.micro_batches(step, rank=rank, world_size=world)
        counts = torch.tensor(
            [sum(b.supervised_tokens for b in batches), sum(b.token_count for b in batches)],
            dtype=torch.float64,
            device=device,
        )
        supervised, seen = dist.all_reduce(counts).tolist()
        total = torch.zeros((), dtype=torch.float64, device=device)
        logged = step % section.log_every == 0 or step == data.total_steps - 1
        for number, batch in enumerate(batches):
            for module in modules:
                module.measure = logged and number == 0
            nll = engine.forward(batch.to(device))
            total += nll.detach()
            # Engines average gradients over ranks; the sum over tokens is wanted.
            engine.backward(nll * (world / supervised))
        loss = float(dist.all_reduce(total)) / supervised
        if not math.isfinite(loss):
            raise UserError(_blame(engine, batches, step=step, device=device))
        rate = learning_rate(step, total=data.total_steps, train=section)
        norm = engine.step(rate)
        if not math.isfinite(norm):
            raise UserError(
                f"training: the gradient norm of step {step} is {norm} (loss {loss:.4g}); lower train.learning_rate"
            )
        result.losses.append(loss)
        result.grad_norms.append(norm)
        result.tokens += int(seen)
        result.seconds = time.perf_counter() - started
        if logged:
            values = {
                "train/loss": loss,
                "train/learning_rate": rate,
                "train/grad_norm": norm,
                "train/tokens_per_second": result.tokens_per_second,
                "train/peak_memory_bytes": float(peak_memory()),
            }
            interference = live_interference(engine)
            if dist.is_main():
                scalars.add(step, values | _interference_tags(interference))
            most = f" interference {max(map(float, interference[MIXTURE].values())):.3f}" if interference else ""
            bar.set_postfix_str(f"loss {loss:.4f}{most}")
    for module in modules:
        module.measure = False
    return result


def _interference_tags(found: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    tags: dict[str, float] = {}
    for name, values in found.items():
        numbers = {module: float(value) for module, value in values.items()}
        if name == MIXTURE:
            tags |= {f"interference_per_module/{module}": value for module, value in numbers.items()}
        tags[f"interference/{name}_max"] = max(numbers.values())
        tags[f"interference/{name}_mean"] = sum(numbers.values()) / len(numbers)
    return tags


def _blame(engine: Engine, batches: Sequence[Batch], *, step: int, device: torch.device) -> str:
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
        which = f", sample {', '.join(map(str, samples[row]))} of data.path" if row < len(samples) else ""
        mine = f"rank {dist.rank()}, micro-batch {number}, row {row}, module {name}{which}"
    where = next((place for place in dist.gather(mine) if place is not None), "in the loss alone")
    return (
        f"training: the loss of step {step} is not finite (first at {where}); "
        "lower train.learning_rate, or use base_model.dtype=float32"
    )


def peak_memory() -> int:
    """Bytes this process held at most: on the GPU where there is one, else resident in host memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
