"""A model whose text lies in spans on several processes has the loss and the gradients of one process."""

from __future__ import annotations

import math

import pytest
import torch

import heron
from heron import context
from heron.config import RosaConfig
from heron.errors import ConfigError, DataError
from heron.ops.spans import Span
from tests import warm
from tests.ops.spans_on_threads import on_threads

PACK = [0, 3, 9, 9, 21, 22, 35, 35]  # one that two borders cut, one of one token, two empty ones


def batch(rows=2, tokens=35, seed=0, offsets=None):
    ids, targets = torch.randint(0, 37, (2, rows, tokens), generator=torch.Generator().manual_seed(seed))
    targets[:, ::5] = -100
    targets[:, -9:] = -100  # the last of four spans learns nothing
    return (ids, targets) if offsets is None else (ids, targets, torch.tensor(offsets))


def alone(config, weights, given):
    """Loss and gradients by name, in one process."""
    model = heron.RWKV(config).to(weights["emb.weight"].dtype)
    model.load_state_dict(weights)
    loss = model.loss(*given)
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in model.named_parameters() if leaf.grad is not None}


def on_spans(n, config, weights, given, cuts=None, grad_checkpoint=False):
    """The same from `n` spans, on threads."""

    def job(_, name):
        model = heron.RWKV(config).to(weights["emb.weight"].dtype)
        model.load_state_dict(weights)
        model.grad_checkpoint = grad_checkpoint
        part = context.part_of(name, *given, cuts=cuts)
        loss = model.loss(part.tokens, part.targets, part.cu_seqlens, span=part.span) * part.share
        loss.backward()
        return loss.detach(), {name: leaf.grad for name, leaf in model.named_parameters() if leaf.grad is not None}

    losses, gradients = zip(*on_threads(n, job), strict=True)
    return sum(losses), {name: sum(of_span[name] for of_span in gradients) for name in gradients[0]}


def assert_alike(got, want):
    """Losses and gradients by name, to 1e-12 in fp64 and 1e-6 in fp32."""
    (loss, gradients), (want_loss, wanted) = got, want
    in_fp64 = wanted["emb.weight"].dtype == torch.float64
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-12 if in_fp64 else 1e-6)
    assert gradients.keys() == wanted.keys()
    away = {name: float((gradients[name] - wanted[name]).norm()) for name in wanted}
    sizes = {name: float(wanted[name].norm()) for name in wanted}
    assert math.hypot(*away.values()) < (1e-12 if in_fp64 else 1e-6) * math.hypot(*sizes.values())
    for name in wanted:  # in fp32 the gradient of a decay is a small difference of large sums
        assert away[name] < (1e-11 if in_fp64 else 5e-6) * sizes[name], name


CUTS = {2: [None, [0, 34, 35]], 4: [None, [0, 1, 4, 21, 35]]}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n", CUTS)
@pytest.mark.parametrize("variant", ["v7", "v7a", "v8"])
def test_spans_are_the_text(random_model, variant, n, packed):
    model = random_model(variant=variant).double()
    given = batch(rows=1, offsets=PACK) if packed else batch()
    want = alone(model.config, model.state_dict(), given)
    for cuts in CUTS[n]:
        assert_alike(on_spans(n, model.config, model.state_dict(), given, cuts), want)


REFUSED = {
    "v7b": dict(variant="v7b"),
    "v8-hybrid": dict(variant="v8-hybrid"),
    "ROSA": dict(variant="v8", rosa=RosaConfig.preset("qkv-4bit")),
    "ROSA memory": dict(variant="v8", memory="memory"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_looks_back_over_a_text_is_refused(random_model, kind):
    model = random_model(n_layer=1, **REFUSED[kind])
    assert context.why_not(model.config)
    tokens, targets = batch()
    with pytest.raises(ConfigError, match=r"^span: .* needs the whole text in one place$"):
        model.loss(tokens, targets, span=Span("nobody"))


def test_what_mixes_time_alone_is_not(random_model):
    for variant in ("v7", "v7a", "v8"):
        assert context.why_not(random_model(n_layer=1, variant=variant).config) is None


def test_spans_on_processes_are_the_text_on_one(tmp_path, random_model):
    jobs = []
    for n, variant, seed, given, options in (  # of which fp32 itself is within 2e-6 of fp64
        (2, "v8", 2, batch(), {"grad_checkpoint": True}),
        (4, "v7", 1, batch(rows=1, offsets=PACK), {"cuts": CUTS[4][1]}),
    ):
        model = random_model(variant=variant, seed=seed)
        jobs.append((n, model.config, model.state_dict(), given, options))
    torch.save(jobs, tmp_path / "jobs.pt")
    warm.run(["-m", "tests.context.spans_of_a_model", tmp_path, 4])
    for (_, config, weights, given, _), answer in zip(jobs, torch.load(tmp_path / "answers.pt"), strict=True):
        assert_alike(answer, alone(config, weights, given))


def test_what_does_not_fit_is_refused():
    def job(_, name):
        with pytest.raises(DataError, match=r"^tokens: 2 processes share them, wanted at least one each, got 1$"):
            context.part_of(name, *batch(tokens=1))
        for cuts in ([0, 35], [0, 0, 35], [1, 2, 35], [0, 2, 34]):
            with pytest.raises(ConfigError, match=r"^cuts: wanted 3 numbers from 0 up to 35, got \["):
                context.part_of(name, *batch(), cuts=cuts)

    on_threads(2, job)


def test_a_text_that_teaches_nothing_has_no_loss_and_no_gradient(random_model):
    tokens, targets = batch()
    model = random_model(n_layer=1, variant="v7")
    loss, gradients = on_spans(2, model.config, model.state_dict(), (tokens, torch.full_like(targets, -100)))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())
