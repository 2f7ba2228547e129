"""Documents packed into one row are as if each were alone: logits, states, the loss and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch

from heron.config import RosaConfig
from heron.errors import ConfigError
from heron.model import State

VARIANTS = {
    "v7": {},
    "v7a": {},
    "v7b": {},
    "v8": {},
    "v8, 4x": dict(variant="v8", deep_embed_4x=True),
    "v8-hybrid": {},
    "v8 and ROSA": dict(variant="v8", rosa=RosaConfig.preset("qkv-4bit")),
    "rosa-lm": {},
}
LENGTHS = [[9], [3, 1, 5], [0, 4, 0, 1, 4, 0]]


@pytest.fixture(params=VARIANTS)
def model(request, random_model):
    return random_model(n_layer=2, **{"variant": request.param, **VARIANTS[request.param]}).double()


def packed(lengths, seed=0):
    ids = torch.randint(0, 37, (2, 1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    return *ids, torch.tensor([0, *itertools.accumulate(lengths)])


def states_of(model, lengths, states):
    """One state a document, whether they came as one or as a tuple."""
    if isinstance(states, tuple):
        return list(states)
    return [states.map(lambda part, i=i: part[i : i + 1]) for i in range(len(lengths))]


def alone(model, tokens, offsets, states=None):
    """Logits of all documents, and the state behind each, from a call for each."""
    logits, new = [], []
    for i, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        state = None if states is None else states[i]
        if begin == end:
            new.append(state or State.zeros(model.config, 1, tokens.device, torch.float64))
            continue
        out, state = model(tokens[:, begin:end], state)
        logits.append(out)
        new.append(state)
    return torch.cat(logits, dim=1), new


def assert_states_equal(got, want):
    for one, other in zip(got, want, strict=True):
        for a, b in zip(one.to_list(), other.to_list(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_logits_and_states_are_those_of_each_document_alone(model, lengths):
    tokens, _, offsets = packed(lengths)
    with torch.no_grad():
        logits, states = model(tokens, None, offsets)
        want, wanted_states = alone(model, tokens, offsets)
        torch.testing.assert_close(logits, want, rtol=1e-9, atol=1e-9)
        assert_states_equal(states_of(model, lengths, states), wanted_states)
        more, _, _ = packed(lengths, seed=1)
        logits, states = model(more, states, offsets)
        want, wanted_states = alone(model, more, offsets, wanted_states)
        torch.testing.assert_close(logits, want, rtol=1e-9, atol=1e-9)
        assert_states_equal(states_of(model, lengths, states), wanted_states)


def test_gradients_are_those_of_each_document_alone(model):
    lengths = [4, 0, 1, 6]
    tokens, targets, offsets = packed(lengths)
    loss = model.loss(tokens, targets, offsets)
    loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    want = 0.0
    for begin, end in itertools.pairwise(offsets.tolist()):
        if begin < end:
            part = slice(begin, end)
            # L2Wrap weighs by the number of targets, as the mean does
            share = (end - begin) / sum(lengths)
            (model.loss(tokens[:, part], targets[:, part]) * share).backward()
            want += model.loss(tokens[:, part], targets[:, part]).item() * share
    assert float(loss) == pytest.approx(want, rel=1e-12)
    assert got.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("variant", ["v8", "v7b"])
def test_what_does_not_fit_is_refused_in_words(random_model, variant):
    model, (tokens, _, offsets) = random_model(n_layer=1, variant=variant), packed([4, 5])
    for wrong, words in (
        (offsets.double(), "int32 or int64"),
        (offsets[:1], r"got \(1,\)"),
        (torch.tensor([0, 4, 8]), r"from 0 to T = 9 that never decrease, got \[0, 4, 8\]"),
        (torch.tensor([0, 5, 4, 9]), "never decrease"),
    ):
        with pytest.raises(ConfigError, match=f"cu_seqlens: .*{words}"):
            model(tokens, None, wrong)
    for other in ([0, 4, 9], (0, 9), range(10)):
        with pytest.raises(ConfigError, match=f"cu_seqlens: wanted a tensor .* got {type(other).__name__};"):
            model(tokens, cu_seqlens=other)
    with pytest.raises(ConfigError, match=r"tokens \(1, T\); got .* tokens \(2, 9\)"):
        model(tokens.expand(2, 9), None, offsets)
    _, one = model(tokens)
    wanted = "layer 0, att_shift: wanted \\(2, 32\\)" if variant == "v8" else "a tuple of 2 states, .*got State"
    with pytest.raises(ConfigError, match=wanted):
        model(tokens, one, offsets)
