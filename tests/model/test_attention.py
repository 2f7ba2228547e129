"""DeepEmbedAttention: its bounded memory and its state; the equations and all roads to them are in test_rwkv.py."""

from __future__ import annotations

import math

import pytest
import torch

import heron
from heron.errors import ConfigError
from heron.model import attention
from heron.model.attention import attend

both = pytest.mark.parametrize("variant", ["v7b", "v8-hybrid"])


def ids(*shape, seed=1):
    return torch.randint(37, shape, generator=torch.Generator().manual_seed(seed))


def qkv(n_queries, n_keys, batch=2, width=5):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, n_queries, 256), (batch, n_keys, 256), (batch, n_keys, width))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("cap", [32.0, 64.0])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (1, 9), (4, 9), (9, 9)])
def test_attend_is_its_equation(n_queries, n_keys, window, cap):
    q, k, v = qkv(n_queries, n_keys)
    q = 9 * q  # so that the cap matters
    got = attend(q, k, v, cap, window)
    for row in range(2):
        for i in range(n_queries):
            t = n_keys - n_queries + i
            seen = range(0 if window is None else max(0, t - window + 1), t + 1)
            scores = [cap * math.tanh(float(q[row, i] @ k[row, j]) / (16 * cap)) for j in seen]
            total = sum(math.exp(score) for score in scores)
            want = sum(math.exp(score) / total * v[row, j] for score, j in zip(scores, seen, strict=True))
            assert torch.allclose(got[row, i], want, rtol=1e-11, atol=1e-12)


@both
def test_queries_in_pieces_are_queries_at_once(random_model, monkeypatch, variant):
    model, tokens, targets = random_model(variant=variant).double(), ids(2, 19), ids(2, 19, seed=2)

    def run(window):
        model.zero_grad()
        model.attention_window = window
        logits, state = model(tokens)
        loss = model.loss(tokens, targets)
        loss.backward()
        return [logits, state.tokens, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    for window in (None, 6):
        monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 512)
        whole = run(window)
        monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 4)
        for got, want in zip(run(window), whole, strict=True):
            assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)


def test_the_backward_keeps_no_scores(monkeypatch):
    """Saved for the backward: O(S) values a piece, not the (T, S) scores."""
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 16)
    q, k, v = (x.requires_grad_() for x in qkv(128, 128, batch=1))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        attend(q, k, v, 32.0).sum().backward()
    forward = [shape for shape in saved if shape[-1] == 128]  # the widest scores are (1, 16, 128)
    assert not forward


@both
def test_a_window_bounds_what_is_read_and_what_is_kept(random_model, variant):
    """With a window of n, the parallel form == one by one == cuts, and the state stays at n tokens."""
    model, tokens = random_model(variant=variant).double(), ids(2, 23)
    with torch.no_grad():
        free, free_end = model(tokens)
        model.attention_window = 6
        logits, end = model(tokens)
        assert torch.allclose(logits[:, :6], free[:, :6], rtol=1e-12)
        assert not torch.allclose(logits[:, 6:], free[:, 6:], rtol=1e-3)
        for pieces in ([1] * 23, [4, 1, 9, 9], [22, 1]):
            state, parts = None, []
            for piece in tokens.split(pieces, dim=1):
                out, state = model(piece, state)
                parts.append(out)
                assert state.tokens.shape[1] <= 6
            assert torch.allclose(torch.cat(parts, dim=1), logits, rtol=1e-10, atol=1e-11)
            for got, want in zip(state.to_list(), end.to_list(), strict=True):
                assert torch.allclose(got, want, rtol=1e-10, atol=1e-11)
        assert torch.equal(end.tokens, tokens[:, -6:])
        assert free_end.nbytes - end.nbytes == 2 * (23 - 6) * (3 * 64 * 8 + 8)
        assert sum(part.untyped_storage().nbytes() for part in end.to_list()) == end.nbytes


def test_a_window_of_nothing_is_refused(random_model):
    model = random_model(variant="v7b")
    model.attention_window = 0
    with pytest.raises(ConfigError, match="attention_window: wanted at least 1, or None for all tokens, got 0"):
        model(ids(1, 3))


@both
def test_the_state_grows_by_64_values_a_layer_and_an_id(random_model, variant):
    model = random_model(variant=variant)
    sizes = []
    with torch.no_grad():
        for n in (1, 2, 40):
            _, state = model(ids(2, n))
            sizes.append(state.nbytes)
            assert sum(part.untyped_storage().nbytes() for part in state.to_list()) == state.nbytes
    fixed = 3 * 2 * 4 * (32 + 2 * 16 * 16 + 32 + (256 if variant == "v7b" else 0))
    assert sizes == [fixed + n * 2 * (3 * 64 * 4 + 8) for n in (1, 2, 40)]


@both
def test_the_list_has_upstreams_order_and_comes_back(random_model, variant):
    model = random_model(variant=variant)
    _, state = model(ids(2, 4))
    parts = state.to_list()
    layer = [(2, 32), (2, 2, 16, 16), (2, 32)]
    queries = [(2, 256)] * 3 if variant == "v7b" else []
    assert [tuple(part.shape) for part in parts] == [*layer * 3, (2, 4), *[(2, 4, 32)] * 6, *queries]
    assert parts[9] is state.tokens
    assert parts[9 + 1 + 2] is state.layers[1].attention.k_codes
    assert parts[9 + 2 + 2] is state.layers[1].attention.v_codes
    if variant == "v7b":
        assert parts[16 + 2] is state.layers[2].attention.last_query
    again = heron.State.from_list(parts)
    assert all(a is b for a, b in zip(again.to_list(), parts, strict=True))
    for bad in (parts[:10], parts[:-1], [*parts, parts[-1]], parts[9:]):
        with pytest.raises(ConfigError, match=f"state list: wanted 3 tensors per layer.*got {len(bad)} tensors"):
            heron.State.from_list(bad)


def test_a_context_that_does_not_fit_is_refused(random_model):
    model, other = random_model(variant="v7b"), random_model(variant="v8-hybrid")
    _, state = model(ids(2, 4))
    _, foreign = other(ids(2, 4))
    first = state.layers[0]
    short = first._replace(attention=first.attention._replace(v_codes=first.attention.v_codes[:, 1:]))
    for bad, words in [
        (random_model()(ids(2, 4))[1], "wanted one of a v7b model, got one without a context"),
        (foreign, r"layer 0, attention.last_query: wanted \(2, 256\), got None"),
        (heron.State((short, *state.layers[1:]), state.tokens), r"attention.v_codes: wanted \(2, 4, 32\), got \(2, 3,"),
        (heron.State(state.layers, state.tokens[:, 1:]), r"attention.k_codes: wanted \(2, 3, 32\), got \(2, 4, 32\)"),
        (heron.State(state.layers, state.tokens[:1]), r"state, tokens: wanted \(2, 4\), got \(1, 4\)"),
        (heron.State(state.layers, state.tokens + 37), "state, tokens: ids must be 0 to 36"),
    ]:
        with pytest.raises(ConfigError, match=words):
            model(ids(2, 1), bad)


@pytest.mark.parametrize("variant", ["v7a", "v7b"])
def test_rows_merged_as_upstream_does_give_the_same_logits(random_model, variant):
    """``s_emb + LN0(emb) s_emb_x^T`` in the table and s_emb_x dropped; likewise k_emb and v_emb."""
    model, tokens = random_model(variant=variant), ids(2, 20)
    with torch.no_grad():
        want = model(tokens)[0]
        embedded = model.embed(torch.arange(37))
        for block in model.blocks:
            for part, names in ((block.ffn, ["s_emb"]), (block.qkv, ["k_emb", "v_emb"])):
                for name in names if part is not None else []:
                    residual = getattr(part, f"{name}_x").weight
                    getattr(part, name).weight += embedded @ residual.t()
                    residual.zero_()
        assert torch.allclose(model(tokens)[0], want, atol=1e-5)
        for block in model.blocks:  # and that residual mattered
            block.ffn.s_emb.weight.zero_()
        assert not torch.allclose(model(tokens)[0], want, atol=1e-2)
