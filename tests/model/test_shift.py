"""heron.model.shift.normed: the norms before the first block and behind the last."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from heron.model.shift import Norm, normed
from heron.ops import shift_mix
from heron.ops._choice import Choice

SHAPE = (2, 5, 16)


def gradients(norm, function, x, branch, d):
    parts = [part for part in (x, branch) if part is not None]
    leaves = [part.detach().requires_grad_() for part in parts]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, norm.weight, norm.bias], d)]


@pytest.fixture
def by_kernel(monkeypatch):
    """Whether kernels are said to run; how often shift_mix was called, which is then its definition."""
    from heron.model import shift

    called = []

    def call(*arguments, **settings):
        called.append(arguments)
        return shift_mix(*arguments, **settings, impl="reference")

    def begin(runs):
        choice = Choice("cuda" if runs else "reference", "")
        monkeypatch.setattr(shift, "shift_mix_choice", lambda *_: choice)
        monkeypatch.setattr(shift.ops, "shift_mix", call)
        return called

    return begin


@pytest.mark.parametrize("has_branch", [False, True])
def test_a_norm_by_the_kernels_of_shift_mix_is_the_norm(by_kernel, has_branch):
    torch.manual_seed(0)
    norm = nn.LayerNorm(SHAPE[-1], dtype=torch.float64)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, branch, d = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(3))
    branch = branch if has_branch else None
    called = by_kernel(True)
    mine = gradients(norm, lambda *leaves: normed(norm, *leaves), x, branch, d)
    assert len(called) == 1
    theirs = gradients(norm, lambda *leaves: norm(sum(leaves)), x, branch, d)
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want)


def test_a_norm_is_called_where_it_is_not_plain_or_nothing_learns(by_kernel):
    norm, x = nn.LayerNorm(SHAPE[-1]), torch.randn(SHAPE)
    called = by_kernel(True)
    with torch.no_grad():
        assert torch.equal(normed(norm, x, x), norm(2 * x))
    normed(norm, x.bfloat16().float()[0])  # (T, C)
    seen = []
    norm.register_forward_hook(lambda *_: seen.append(True))
    normed(norm, x)
    assert seen == [True]
    assert called == []
    by_kernel(False)
    normed(nn.LayerNorm(SHAPE[-1]), x)
    assert called == []


class Tagged(torch.Tensor):
    """A tensor of another class, as a quantized weight is."""


def test_a_norm_of_the_network_is_by_the_kernels_when_it_is_called_too(by_kernel):
    norm, x, branch = Norm(SHAPE[-1]), torch.randn(SHAPE), torch.randn(SHAPE)
    called, seen = by_kernel(True), []
    want = nn.functional.layer_norm(x + branch, norm.normalized_shape, eps=norm.eps)
    torch.testing.assert_close(normed(norm, x, branch), want)
    assert called[-1][0] is x
    assert called[-1][1] is branch
    norm.register_forward_hook(lambda _, given, out: seen.append(given))
    torch.testing.assert_close(normed(norm, x, branch), want)
    assert len(called) == 2
    assert torch.equal(called[-1][0], x + branch)
    assert called[-1][1] is None
    assert torch.equal(seen[0][0], x + branch)  # of a hook, one input: what is normed
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(Tagged))
    torch.testing.assert_close(normed(norm, x, branch).as_subclass(torch.Tensor), want)
    assert (len(called), len(seen)) == (2, 2)


@pytest.mark.gpu
def test_a_norm_on_a_gpu_is_as_exact_as_pytorchs():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    norm = nn.LayerNorm(768, device="cuda").bfloat16()
    x, branch, d = (torch.randn(4, 300, 768, device="cuda").bfloat16() for _ in range(3))
    mine = gradients(norm, lambda *leaves: normed(norm, *leaves), x, branch, d)
    theirs = gradients(norm, lambda *leaves: norm(sum(leaves)), x, branch, d)
    exact_norm = nn.LayerNorm(768, device="cuda").double()
    exact = gradients(exact_norm, lambda *leaves: exact_norm(sum(leaves)), *(part.double() for part in (x, branch, d)))
    for got, other, want in zip(mine, theirs, exact, strict=True):
        assert (got.double() - want).norm() <= 2 * (other.double() - want).norm() + 1e-6 * want.norm()
