"""What a user does with any module: torch.compile, torch.export and torch.func, against the same calls as they are.

`aot_eager` captures the graphs and runs them as they are, so its numbers are the same bit for bit. The whole of
torch.compile, with C++, has WKV7, and a model among the tests that take long.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import heron
from heron.errors import KernelError
from heron.ops import _build

MODELS = {
    "v7": dict(variant="v7"),
    "v8-hybrid and rosa": dict(variant="v8-hybrid", rosa="qkv-4bit"),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def model(request, random_model):
    return random_model(n_layer=1, vocab_size=29, **request.param)


def ids(rows, tokens, seed=0):
    return torch.randint(0, 29, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def gradients(model, value):
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]


def used(model, tokens, targets, state=None):
    """Loss, logits and state, of which one number has gradients by everything."""
    logits, after = model(tokens, state)
    return model.loss(tokens, targets), logits, after


def assert_close(got, want, tolerance):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def read(model, tokens, targets, state=None):
    """The same with a loss of PyTorch's own, in half the time to compile."""
    logits, after = model(tokens, state)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits, after


def check_compiled(model, backend, tolerance, function=used):
    torch._dynamo.reset()
    tokens, targets = ids(2, 17), ids(2, 17, seed=1)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    before = model(ids(2, 3, seed=2))[1].detach()
    results, slopes = [], []
    for run in (compiled, function):
        loss, logits, state = run(model, tokens, targets, before)
        slopes.append(gradients(model, loss + logits.square().mean() + state.layers[-1].wkv.square().mean()))
        results.append((loss.detach(), logits.detach(), *state.detach().to_list()))
    assert_close(*results, tolerance)
    assert_close(*slopes, 10 * tolerance)
    return compiled


def test_a_model_is_one_graph_with_the_same_numbers_and_gradients(model):
    of_v7 = model.config.variant == "v7"
    compiled = check_compiled(model, "aot_eager", 0, used if of_v7 else read)  # the loss is the same operator in both
    if of_v7:
        with pytest.raises(KernelError, match=r"targets must be in \[0, 29\).* got 29"):
            compiled(model, ids(2, 17), torch.full((2, 17), 29))


needs_compiler = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler on the path")


@needs_compiler
def test_wkv7_among_operators_of_torch_compiles_own_compiler():
    """All else in a model is PyTorch's own."""
    torch._dynamo.reset()
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 17, 24, generator=draw), torch.randn(24, 6 * 24, generator=draw) / 5
    start = torch.randn(2, 3, 8, 8, generator=draw)

    def mixed(x, weight, start):
        r, w, k, v, a, b = (x @ weight).view(2, 17, 6, 3, 8).unbind(2)  # strided as no kernel is promised
        a = nn.functional.normalize(a, dim=-1)
        y, state = heron.ops.wkv7(r, w.sigmoid(), k, v, -a, a * b.sigmoid(), start)
        return y * x.view(2, 17, 3, 8).tanh(), state

    results, slopes = [], []
    for run in (torch.compile(mixed, fullgraph=True), mixed):
        given = [tensor.clone().requires_grad_() for tensor in (x, weight, start)]
        y, state = run(*given)
        slopes.append(torch.autograd.grad(y.square().mean() + state.square().mean(), given))
        results.append((y.detach(), state.detach()))
    assert_close(*results, 1e-5)
    assert_close(*slopes, 1e-4)


@pytest.mark.long
@needs_compiler
def test_torch_compile_with_its_own_compiler(random_model):
    check_compiled(random_model(n_layer=1, vocab_size=29, variant="v8"), "inductor", 1e-5, read)


def test_an_exported_model_takes_any_batch_and_length_and_survives_a_file(model):
    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("T", min=2)}
    exported = torch.export.export(model, (ids(2, 17),), dynamic_shapes=(sizes, None)[:1])
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    tokens = ids(3, 41)
    logits, state = torch.export.load(file).module()(tokens)
    want, want_state = model(tokens)
    assert isinstance(state, heron.State)
    assert_close((logits, *state.to_list()), (want, *want_state.to_list()), 1e-6)


def test_an_exported_model_goes_on_from_a_state(model):
    before = model(ids(2, 5))[1].detach()
    exported = torch.export.export(model, (ids(2, 7), before))
    got, want = exported.module()(ids(2, 7), before), model(ids(2, 7), before)
    assert_close((got[0], *got[1].to_list()), (want[0], *want[1].to_list()), 1e-6)


@pytest.fixture(scope="module")
def reader(random_model):
    return random_model(n_layer=1, vocab_size=29, variant="v8")


def test_an_exported_model_reads_packed_documents_wherever_they_begin(reader):
    sizes = {"tokens": {1: torch.export.Dim("T", min=2)}, "cu_seqlens": {0: torch.export.Dim("n", min=3)}}
    given = {"tokens": ids(1, 17), "cu_seqlens": torch.tensor([0, 5, 5, 17])}
    exported = torch.export.export(reader, (), given, dynamic_shapes=sizes).module()
    for tokens, offsets in ((ids(1, 17), [0, 16, 17, 17]), (ids(1, 40, seed=1), [0, 3, 20, 20, 21, 40])):
        cu_seqlens = torch.tensor(offsets)
        got, want = (model(tokens=tokens, cu_seqlens=cu_seqlens) for model in (exported, reader))
        assert_close((got[0], *got[1].to_list()), (want[0], *want[1].to_list()), 1e-6)
    with pytest.raises(KernelError, match=r"cu_seqlens must go from 0 to T = 17 .* got \[0, 12, 9, 17\]"):
        exported(tokens=ids(1, 17), cu_seqlens=torch.tensor([0, 12, 9, 17]))


def test_packed_documents_are_one_graph_with_the_same_numbers_and_gradients(reader):
    torch._dynamo.reset()
    tokens, targets, cu_seqlens = ids(1, 17), ids(1, 17, seed=1), torch.tensor([0, 5, 5, 17])
    before = reader(ids(3, 3, seed=2))[1].detach()

    def read(tokens, targets, state, cu_seqlens):
        logits, after = reader(tokens, state, cu_seqlens)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits, after

    results, slopes = [], []
    for run in (torch.compile(read, backend="aot_eager", fullgraph=True), read):
        loss, logits, state = run(tokens, targets, before, cu_seqlens)
        slopes.append(gradients(reader, loss + logits.square().mean() + state.layers[-1].wkv.square().mean()))
        results.append((loss.detach(), logits.detach(), *state.detach().to_list()))
    assert_close(*results, 1e-6)
    assert_close(*slopes, 1e-5)


class Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, targets):
        return self.model.loss(tokens, targets)


def test_torch_func_gives_gradients_of_a_batch_and_of_each_sample(model):
    network, tokens, targets = Loss(model), ids(3, 17), ids(3, 17, seed=1)
    weights = dict(network.named_parameters())

    def loss(weights, tokens, targets):
        return functional_call(network, weights, (tokens, targets))

    assert_close(grad(loss)(weights, tokens, targets).values(), gradients_like(weights, model, tokens, targets), 1e-5)
    each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, tokens.unsqueeze(1), targets.unsqueeze(1))
    for i in range(3):
        want = gradients_like(weights, model, tokens[i : i + 1], targets[i : i + 1])
        assert_close([gradient[i] for gradient in each.values()], want, 1e-4)
    logits, states = vmap(model)(tokens.unsqueeze(1))
    assert isinstance(states, heron.State)
    assert_close([logits.squeeze(1)], [model(tokens)[0]], 1e-5)


def gradients_like(weights, model, tokens, targets):
    found = gradients(model, model.loss(tokens, targets))
    return [gradient.expand_as(weight) for gradient, weight in zip(found, weights.values(), strict=True)]


def test_what_the_operators_cannot_differentiate_is_refused_in_a_sentence(model):
    weights, tokens = dict(model.named_parameters()), ids(1, 9)

    def total(bias):
        return (
            functional_call(
                model, {**weights, "blocks.0.ln3.bias" if model.config.rosa else "blocks.0.ln1.bias": bias}, (tokens,)
            )[0]
            .square()
            .sum()
        )

    bias = torch.zeros(model.config.n_embd)
    with pytest.raises(KernelError, match="forward-mode .*use reverse mode: torch.func.grad"):
        jvp(total, (bias,), (torch.ones_like(bias),))
    with pytest.raises(KernelError, match="second derivatives are not there"):
        grad(lambda bias: grad(total)(bias).sum())(bias)
