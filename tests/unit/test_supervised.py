"""The root module asks no device for a value behind the blocks, and computes what masks would compute, to the bit."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nslora_dist.adapter import AdaptedLinear, Observation
from nslora_dist.batches import IGNORED, Batch, filler, pad_right, places_on
from nslora_dist.frozen import FrozenHead, FrozenLinear
from nslora_dist.supervised import Compared, Offered, Scored, SupervisedModel

VOCABULARY, WIDTH = 23, 8
META = torch.device("meta")
"""Tensors there have no values: an operation whose result's size hangs on values raises, as it would wait on a GPU."""


class Blocks(nn.Module):
    """Stands in for the decoder, whose masks are Hugging Face's affair."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.embed(input_ids).tanh())


def root() -> SupervisedModel:
    torch.manual_seed(0)
    causal = nn.Module()
    causal.model = Blocks()
    causal.lm_head = FrozenHead(nn.Parameter(torch.randn(VOCABULARY, WIDTH), requires_grad=False))
    return SupervisedModel(causal)  # type: ignore[arg-type]


def batch() -> Batch:
    """Four padded rows: labels at the end, at both ends, none, and two that greedy decoding gets right."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in (7, 5, 6, 4)]
    ids, mask = pad_right(rows, 0)
    labels = torch.full_like(ids, IGNORED)
    labels[0, 4:], labels[1, 0], labels[1, 4], labels[3, 2:4] = ids[0, 4:], ids[1, 0], ids[1, 4], ids[3, 2:4]
    with torch.no_grad():
        model = root()
        labels[3, 2:4] = model.model.lm_head(model.model.model(ids).last_hidden_state[3, 1:3]).argmax(-1)
    return Batch(ids, mask, None, labels)


def offered() -> Offered:
    options = torch.tensor([[3, 5, IGNORED], [1, IGNORED, IGNORED], [4, 2, 9], [0, 1, IGNORED]])
    return Offered(**vars(batch()), options=options)


def compared(against: Tensor) -> Compared:
    own = batch()
    return Compared(**vars(own.to(against.device)), real=places_on(against.device, own.real_tokens), against=against)


def scored() -> Scored:
    return Scored(**vars(batch()))


@pytest.mark.parametrize("make", [batch, scored, offered, partial(filler, 0)])
@torch.no_grad()
def test_evaluation_waits_for_no_device(make: Callable[[], Batch]) -> None:
    given = make()
    found = root().to(META).eval()(given.to(META))
    assert found.device == META and len(found) == len(given.input_ids)


def test_training_and_divergence_wait_for_no_device() -> None:
    model = root().to(META)
    model.train()(batch().to(META)).backward()
    assert model.model.model.embed.weight.grad.shape == (VOCABULARY, WIDTH)
    hidden = model.model.model(batch().input_ids.to(META)).last_hidden_state
    assert model.eval()(compared(hidden)).shape == (2,)


def test_measuring_waits_for_no_device() -> None:
    base = FrozenLinear(nn.Linear(WIDTH, WIDTH, bias=False, device=META), quantized=False, dtype=torch.float32)
    sizes: dict[str, Any] = {"in_features": WIDTH, "out_features": WIDTH, "rank": 2, "scale": 1.0}
    module = AdaptedLinear(base, name="q", **sizes, freeze_a=True, residual=False, dtype=torch.float32).to(META)
    module.observation = Observation(places_on(META, batch().real_tokens), grams={})
    module(torch.empty(*batch().input_ids.shape, WIDTH, device=META))
    assert module.observation.grams is not None and module.observation.grams["q"].shape == (2, 2)


class Copies(TorchDispatchMode):
    """Whether each copy to another device was waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.waited.append(not kwargs.get("non_blocking", False))
        return func(*args, **(kwargs or {}))


def test_sending_a_batch_waits_for_no_device() -> None:
    own = replace(batch(), position_ids=torch.arange(7)[None].expand(4, -1))
    with Copies() as copies:
        sent = own.to(META)
    assert copies.waited == [False] * 6
    assert all(getattr(sent, name).device == META for name in ("input_ids", "attention_mask", "position_ids", "labels"))
    assert len(sent.predictors[0]) == own.supervised_tokens


def test_loss_and_gradient_are_those_of_a_mask() -> None:
    model, given = root().train(), batch()
    loss = model(given)
    loss.backward()
    (found,) = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    keep = given.labels[:, 1:] != IGNORED
    hidden = model.model.model(given.input_ids).last_hidden_state
    wanted = model.model.lm_head(hidden[:, :-1][keep], given.labels[:, 1:][keep])
    wanted.backward()
    assert torch.equal(loss, wanted)
    assert torch.equal(found, model.model.model.embed.weight.grad)
    assert torch.equal(model(given.to("cpu")), wanted), "looked up beforehand"
    assert model(filler(0)) == 0


@torch.no_grad()
def test_evaluation_is_that_of_each_row_alone() -> None:
    model, given = root().eval(), batch()
    likely = model.model.lm_head(model.model.model(given.input_ids).last_hidden_state).log_softmax(-1).double()
    right, sums = [], []
    for row, labels in zip(likely, given.labels, strict=True):
        at = [place for place in range(1, len(labels)) if labels[place] != IGNORED]
        right.append(bool(at) and all(int(row[place - 1].argmax()) == int(labels[place]) for place in at))
        sums.append(sum(float(row[place - 1, labels[place]]) for place in at))
    assert model(given).tolist() == right == [False, False, False, True]
    likelihoods = model(scored())
    assert likelihoods[:, 0].tolist() == pytest.approx(sums, rel=1e-6)
    assert likelihoods[:, 1].tolist() == [0, 0, 1, 1], "of no label every one is right"
    found = model(offered())
    last = (given.attention_mask.sum(1) - 1).tolist()
    for number, options in enumerate(offered().options.tolist()):
        wanted = [0.0 if option == IGNORED else float(likely[number, last[number], option]) for option in options]
        assert found[number, :, 0].tolist() == pytest.approx(wanted, rel=1e-6)


@torch.no_grad()
def test_divergence_is_of_real_tokens() -> None:
    model, given = root().eval(), batch()
    hidden = model.model.model(given.input_ids).last_hidden_state
    moved = hidden + 0.1
    real = given.attention_mask.bool()
    found = model(compared(moved))
    assert found[0] == model.model.lm_head(hidden[real], against=moved[real]).double().sum() and found[1] == real.sum()


def test_real_tokens() -> None:
    given = batch()
    rows, columns = given.real_tokens
    mask = torch.zeros_like(given.input_ids)
    mask[rows, columns] = 1
    assert torch.equal(mask, given.attention_mask)
    assert len(replace(given, attention_mask=None).real_tokens[0]) == given.input_ids.numel()
    assert len(filler(0).real_tokens[0]) == 0
    packed = replace(given, attention_mask=None, unmasked_padding=6)
    assert len(packed.real_tokens[0]) == given.input_ids.numel(), "padding behind packed samples is not marked"
