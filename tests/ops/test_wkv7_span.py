"""A text cut into spans, each computed on a thread of its own, is as if it were one: outputs, states, gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from heron.ops import wkv7, wkv7_span, wkv7_span_gradient
from heron.ops.spans import Span, last_before
from heron.ops.wkv7.span import composed
from tests.ops.spans_on_threads import on_threads
from tests.ops.test_wkv7 import NAMES, errors, problem, run

CUTS = [(0, 20, 40), (0, 1, 40), (0, 39, 40), (0, 7, 24, 25, 40)]


def edges_of(offsets: list[int], begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Span.edges and cu_seqlens of tokens `begin` to `end` of packed sequences, cut by hand."""
    inside = [offset - begin for offset in offsets if begin < offset < end]
    local = [0, *inside, end - begin]
    return torch.tensor([begin not in offsets, local[1], local[-2], len(inside)]), torch.tensor(local)


def in_spans(inputs, gradients, cuts, impl, dtype=torch.float64, offsets=None, autocast=False):
    """As `run` of test_wkv7: the results of all spans, put together."""
    *tokens, state = (x.to(dtype) for x in inputs)
    dy, d_final = (x.to(dtype) for x in gradients)
    stretches = list(pairwise(cuts))

    def job(i, name):
        begin, end = stretches[i]
        edges, cu_seqlens = (None, None) if offsets is None else edges_of(offsets, begin, end)
        mine = [x[:, begin:end].clone().requires_grad_() for x in tokens]
        if offsets is None:
            first, last = 0, state.shape[0]
        else:  # the sequences that have tokens here
            first = max(n for n, offset in enumerate(offsets) if offset <= begin)
            last = first + len(cu_seqlens) - 1
        before = state[first:last].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, autocast):
            y, final = wkv7(*mine, before, impl, cu_seqlens=cu_seqlens, span=Span(name, edges))
        ends_here = [end == cuts[-1] if offsets is None else offsets[n + 1] <= end for n in range(first, last)]
        of_final = d_final[first:last] * torch.tensor(ends_here).view(-1, 1, 1, 1)
        grads = torch.autograd.grad((y, final), (*mine, before), (dy[:, begin:end], of_final))
        return y.detach(), final.detach(), (first, last), grads

    done = on_threads(len(stretches), job)
    final, d_state = torch.zeros_like(state), torch.zeros_like(state)
    for _, of_span, (first, last), grads in done:
        final[first:last] = of_span  # the span in which a sequence ends comes last
        d_state[first:last] += grads[-1]
    d_inputs = [torch.cat(parts, dim=1) for parts in zip(*(grads[:-1] for *_, grads in done), strict=True)]
    results = (torch.cat([y for y, *_ in done], dim=1), final, *d_inputs, d_state)
    return dict(zip(NAMES, results, strict=True))


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_spans_are_the_text(impl, cuts):
    inputs, gradients = problem()
    want = run(inputs, gradients, "reference")
    assert max(errors(in_spans(inputs, gradients, cuts, impl), want).values()) < 1e-12
    found = errors(in_spans(inputs, gradients, cuts, impl, torch.float32), want)
    assert max(found.values()) < 1e-6, found


def test_autocast_rounds_no_state_on_its_way():
    inputs, gradients = problem()
    want, got = (
        in_spans(inputs, gradients, (0, 7, 24, 40), "chunked", torch.float32, autocast=autocast)
        for autocast in (False, True)
    )
    assert all(torch.equal(got[name], want[name]) for name in want)
    tensors = [x.float() for x in inputs[1:6]]
    want = wkv7_span(*tensors, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, wkv7_span(*tensors, "reference"), want))


OFFSETS = [[0, 40], [0, 20, 40], [0, 7, 40], [0, 26, 40], [0, 3, 9, 22, 23, 24, 31, 40]]


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_spans_begin_inside_packed_sequences(cuts, offsets):
    inputs, gradients = problem(batch=1)
    states = problem(batch=len(offsets) - 1)
    inputs[-1], gradients[-1] = states[0][-1], states[1][-1]
    leaves = [x.requires_grad_() for x in inputs]
    outputs = wkv7(*leaves, impl="reference", cu_seqlens=torch.tensor(offsets))
    grads = torch.autograd.grad(outputs, leaves, gradients)
    want = dict(zip(NAMES, (*(x.detach() for x in outputs), *grads), strict=True))
    inputs = [x.detach() for x in inputs]
    assert max(errors(in_spans(inputs, gradients, cuts, "chunked", offsets=offsets), want).values()) < 1e-12


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_span_maps_states_and_their_gradients(impl):
    (r, w, k, v, a, b, state), (dy, d_final) = problem()
    transfer, local = wkv7_span(w, k, v, a, b, impl)
    y, final = wkv7(r, w, k, v, a, b, state.requires_grad_(), "reference")
    torch.testing.assert_close(state @ transfer + local, final, rtol=1e-12, atol=1e-12)
    (d_state,) = torch.autograd.grad((y, final), state, (dy, d_final))
    got = d_final @ transfer.mT + wkv7_span_gradient(r, w, a, b, dy, impl)
    torch.testing.assert_close(got, d_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_maps_compose_in_order(n):
    transfer, local = torch.randn(2, n, 2, 4, 4, dtype=torch.float64).unbind()
    state = torch.randn(2, 4, 4, dtype=torch.float64)
    want = state
    for one, more in zip(transfer, local, strict=True):
        want = want @ one + more
    together, added = composed(transfer, local)
    torch.testing.assert_close(state @ together + added, want)


@pytest.mark.parametrize("offsets", [None, [0, 4, 12], [0, 6, 12]], ids=str)
def test_the_token_before_comes_from_the_span_before_or_from_the_state(offsets):
    x, last = torch.randn(1, 12, 3), torch.randn(1 if offsets is None else 2, 3)
    d_out = torch.randn(2, 2, 3)

    def job(i, name):
        edges, cu_seqlens = (None, None) if offsets is None else edges_of(offsets, 6 * i, 6 * i + 6)
        n_seq = 1 if offsets is None else len(cu_seqlens) - 1
        latest = x[:, 6 * i + 5].clone().requires_grad_()
        given = last[-n_seq:].clone().requires_grad_()
        out = last_before(Span(name, edges), latest, given, n_seq)
        return out.detach(), *torch.autograd.grad(out, (latest, given), d_out[i, :n_seq])

    (first, d_latest, d_first), (second, d_second_latest, d_second) = on_threads(2, job)
    continues = offsets is None or 6 not in offsets
    torch.testing.assert_close(first, last[-len(first) :])
    torch.testing.assert_close(d_first, d_out[0, : len(first)])
    torch.testing.assert_close(second[0], x[0, 5] if continues else last[-1])
    torch.testing.assert_close(d_latest[0], d_out[1, 0] * continues)
    torch.testing.assert_close(d_second[0], d_out[1, 0] * (not continues))
    assert not d_second_latest.any()
