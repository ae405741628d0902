"""The order in which a micro-batch enters and leaves a sharded model's modules: the trace that ZeRO-3 gathers along."""

from dataclasses import dataclass

from nslora_dist.plan.shapes import Shapes

HEAD = "model.lm_head"


@dataclass(frozen=True)
class Event:
    """A module is entered (``fetch``) or left, in the forward pass (recomputed or not) or in the backward pass."""

    module: str
    fetch: bool
    forward: bool
    recompute: bool = False


def micro_batch_events(shapes: Shapes, *, checkpointing: bool) -> list[Event]:
    """Every module of one micro-batch in order, forward and backward.

    Backward is forward reversed, but:
    without checkpointing the embedding's output takes no gradient, so the first block's input norm has no backward and
    the modules that read it are never left (DeepSpeed releases them at the end); with it, Hugging Face makes the
    embedding's output take one, and a block is recomputed up to its last linear when that linear's saved tensors are
    asked for.
    """
    head, tail = ["", "model.model"], ["model.model.norm", HEAD]
    forward = [Event(name, True, True) for name in head]
    for name in ("model.model.embed_tokens", "model.model.rotary_emb"):
        forward += [Event(name, True, True), Event(name, False, True)]
    for number in range(shapes.layers):
        forward += [Event(_inside(number, path), enters, True) for path, enters in shapes.order]
    forward += [Event(tail[0], True, True), Event(tail[0], False, True), Event("model.model", False, True)]
    forward += [Event(tail[1], True, True), Event(tail[1], False, True), Event("", False, True)]

    backward = [Event("", True, False), Event(tail[1], True, False), Event(tail[1], False, False)]
    backward += [Event("model.model", True, False), Event(tail[0], True, False), Event(tail[0], False, False)]
    for number in reversed(range(shapes.layers)):
        backward += _block_backward(shapes, number, checkpointing=checkpointing)
    if checkpointing:
        backward.append(Event("model.model.embed_tokens", True, False))
    return forward + backward


def _inside(number: int, path: str) -> str:
    return f"model.model.layers.{number}" + (f".{path}" if path else "")


def _block_backward(shapes: Shapes, number: int, *, checkpointing: bool) -> list[Event]:
    back = [Event(_inside(number, path), not enters, False) for path, enters in reversed(shapes.order)]
    if checkpointing:
        inner = [Event(_inside(number, path), enters, True, recompute=True) for path, enters in shapes.order if path]
        innermost = next(i for i, event in enumerate(back) if not event.fetch)  # the last linear is entered, and left
        stop = max(i for i, event in enumerate(inner) if event.module == back[innermost].module and event.fetch)
        return back[:innermost] + inner[: stop + 1] + back[innermost:]
    if number > 0:
        return back
    norm = _inside(0, next(path for path, _ in shapes.order if path))  # the first module of a block reads its input
    readers = _first_readers(shapes)
    kept = []
    for event in back:
        path = event.module.removeprefix("model.model.layers.0").removeprefix(".")
        if event.module == norm or (not event.fetch and path in readers):
            continue
        kept.append(event)
    return kept


def _first_readers(shapes: Shapes) -> set[str]:
    """Modules whose *input* takes no gradient in the first block: what reads its normed input, and what holds those."""
    found = {""}
    for path in {path for path, _ in shapes.order}:
        if path in shapes.readers or path.removesuffix(".base") in shapes.readers:
            found |= {path, path.split(".")[0]}
    return found
