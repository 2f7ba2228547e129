"""heron.ops.squared_relu_mlp: its definition, and its kernels, on a CPU by their source, on a GPU by fp64."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from heron.errors import KernelError
from heron.model.channel_mix import ChannelMix
from heron.ops import _build, squared_relu_mlp
from heron.ops.squared_relu_mlp import cuda, squared_relu_mlp_choice
from tests.ops.kernels import check_that_a_failed_build_is_said_once, check_that_none_spills, needs_nvcc

EMULATOR = Path(__file__).parent / "emulator"
BF16 = torch.bfloat16
needs_compiler = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")


def problem(n_tokens, depth, hidden, device="cpu", seed=0, n_out=None):
    """x, key, value and d_y in bf16."""
    random = torch.Generator(device).manual_seed(seed)
    sizes = (n_tokens, depth), (hidden, depth), (n_out or depth, hidden), (n_tokens, n_out or depth)
    x, key, value, d_y = (torch.randn(size, device=device, generator=random) for size in sizes)
    return [part.to(BF16) for part in (x, key / depth**0.5, value / hidden**0.5, d_y)]


# The kernels' source on a CPU


@pytest.fixture(scope="module")
def emulated():
    """The kernel, forward or with `kept` backward, on so many blocks: what it writes, and the squares."""
    depends = [cuda.SOURCE, *(EMULATOR / name for name in ("boxes.h", "hardware.h", "single_token.h"))]
    flags = ("-O2", "-U_FORTIFY_SOURCE")
    library = _build.load_c_library("squared_relu_emulated", [EMULATOR / "squared_relu.cpp"], flags, depends)
    library.squared_relu_emulated.restype = ctypes.c_char_p

    def run(left, right, kept=None, blocks=2):
        tokens, depth = left.shape
        hidden = right.numel() // depth
        out, squares = (torch.full((tokens, hidden), torch.nan, dtype=BF16) for _ in range(2))
        tensors = (left, right, kept, out, squares)
        pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
        assert library.squared_relu_emulated(*pointers, tokens, hidden, depth, blocks) is None
        return out, squares

    return run


def close(got, want):
    """bf16 of sums in another order."""
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-8)


@needs_compiler
@pytest.mark.parametrize(
    ("n_tokens", "depth", "hidden", "blocks"),
    [(130, 136, 512, 2), (260, 704, 256, 2), (129, 64, 256, 4), (1, 8, 256, 2)],
)
def test_the_kernels_multiply_on_a_cpu(emulated, n_tokens, depth, hidden, blocks):
    x, key, value, d_y = problem(n_tokens, depth, hidden)
    roots, squares = emulated(x, key, blocks=blocks)
    close(roots, (x.float() @ key.float().T).relu().to(BF16))
    assert torch.equal(squares, roots.square())
    d, again = emulated(d_y, value, roots, blocks)
    close(d, (d_y.float() @ value.float()).to(BF16) * 2 * roots)
    assert torch.equal(again, squares)


@needs_compiler
def test_the_kernels_keep_what_is_not_finite(emulated):
    x, key, *_ = problem(130, 8, 256)
    x[3, 2], x[129, 0] = torch.nan, torch.inf
    roots, squares = emulated(x, key)
    want = (x.float() @ key.float().T).relu()
    for got in (roots, squares):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())


@needs_nvcc
def test_the_kernels_compile_without_spilling(tmp_path):
    forms = [f"squared_relu<{backward}>(const __grid_constant__ Problem)" for backward in ("false", "true")]
    check_that_none_spills(tmp_path, cuda.SOURCE, forms, "90a", [_build.BOXES])


# The operator


def test_it_is_the_two_products_of_a_channel_mix():
    x, key, value, _ = (part.double() for part in problem(6, 8, 16, n_out=5))
    want = (x @ key.T).clamp(min=0) ** 2 @ value.T
    torch.testing.assert_close(squared_relu_mlp(x.view(2, 3, 8), key, value), want.view(2, 3, 5))
    parts = [part.requires_grad_() for part in (x, key, value)]
    assert torch.autograd.gradcheck(squared_relu_mlp, parts)


class FromSource:
    """The two operators of the kernels by their source, on tensors on a CPU."""

    def __init__(self, emulated):
        self._emulated = emulated

    def forward(self, x, key):
        roots, squares = self._emulated(x, key)
        return squares, roots

    def backward(self, d_y, value, roots):
        return self._emulated(d_y, value, roots)


@pytest.fixture
def on_cpu(emulated):
    """Has impl="cuda" run on a CPU."""
    library = torch.library.Library("heron", "FRAGMENT")
    source = FromSource(emulated)
    library.impl("squared_relu", source.forward, "CPU")
    library.impl("squared_relu_backward", source.backward, "CPU")
    yield cuda.squared_relu_mlp_cuda
    library._destroy()


def gradients(form, parts, d_y):
    leaves = [part.detach().requires_grad_() for part in parts]
    y = form(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, d_y)]


def check_errors(form, parts, d_y):
    """At most twice as far from fp64 as PyTorch, y and all gradients."""
    exact = gradients(squared_relu_mlp, [part.double() for part in parts], d_y.double())
    theirs = gradients(lambda *leaves: squared_relu_mlp(*leaves, impl="reference"), parts, d_y)
    mine = gradients(form, parts, d_y)
    for want, other, got in zip(exact, theirs, mine, strict=True):
        assert (got.double() - want).norm() <= 2 * (other.double() - want).norm() + 1e-6 * want.norm()
    for first, second in zip(mine, gradients(form, parts, d_y), strict=True):
        assert torch.equal(first, second)


@needs_compiler
def test_gradients_are_at_most_twice_as_far_from_fp64_as_pytorchs(on_cpu):
    *parts, d_y = problem(40, 24, 256, n_out=16)
    parts[0], d_y = parts[0].view(2, 20, 24), d_y.view(2, 20, 16)
    check_errors(on_cpu, parts, d_y)


@needs_compiler
def test_what_is_frozen_gets_no_gradient(on_cpu):
    x, key, value, d_y = problem(20, 8, 256)
    key.requires_grad_()
    on_cpu(x, key, value).backward(d_y)
    assert key.grad is not None
    x.requires_grad_()
    on_cpu(x, key.detach(), value).backward(d_y)
    assert x.grad is not None


@needs_compiler
def test_the_operator_is_what_it_says_to_pytorch(on_cpu):
    parts = [part.requires_grad_() for part in problem(9, 8, 256)[:3]]
    looks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.heron.squared_relu_mlp.default, parts, test_utils=looks)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ((torch.float32, 4096, 768, 3072), "it takes bf16, not torch.float32"),
        ((BF16, 100, 768, 3072), "it takes 2048 tokens or more, not 100"),
        ((BF16, 4096, 768, 3000), "it takes F = 256, 512, ... and C = 8, 16, ..., not 3000 and 768"),
        ((BF16, 4096, 770, 3072), "it takes F = 256, 512, ... and C = 8, 16, ..., not 3072 and 770"),
        ((BF16, 2048, 2048, 8192), None),
    ],
)
def test_it_says_what_the_kernels_do_not_take(monkeypatch, facts, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cuda.why_not(torch.device("cuda"), *facts) == reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert cuda.why_not(torch.device("cuda"), *facts) == "it is for compute capability 9.0"


def test_it_is_built_for_compute_capability_9_alone(monkeypatch):
    built = []
    monkeypatch.setattr(_build, "load_kernels_for", lambda capability, *_: built.append(capability))
    for capability in ((8, 6), (9, 0), (12, 0)):
        cuda.library.__wrapped__(capability)
    assert built == [(9, 0)]


def test_unfit_arguments_are_refused_in_words():
    x, key, value, _ = problem(3, 8, 256)
    with pytest.raises(KernelError, match=r"wanted x \(..., C\), key \(F, C\) and value \(C_out, F\); got \(3, 8\)"):
        squared_relu_mlp(x, key.T, value)
    with pytest.raises(KernelError, match="impl must be auto, reference, cuda; got 'fast'"):
        squared_relu_mlp(x, key, value, impl="fast")
    with pytest.raises(KernelError, match='impl="cuda": it needs tensors on a CUDA device, got cpu; use impl="auto"'):
        squared_relu_mlp(x, key, value, impl="cuda")
    with pytest.raises(KernelError, match="it takes one dtype, not torch.bfloat16, torch.float32 and torch.bfloat16"):
        squared_relu_mlp(x, key.float(), value, impl="cuda")


def test_a_kernel_that_cannot_be_built_is_said_once(monkeypatch, capsys):
    said = cuda.FORM, lambda: squared_relu_mlp_choice(torch.device("cuda")), "reference", "squared_relu"
    check_that_a_failed_build_is_said_once(monkeypatch, capsys, *said)


def test_a_channel_mix_hands_its_weights_over_where_nothing_stands_around_them(monkeypatch):
    from heron import ModelConfig, ops

    called = []
    monkeypatch.setattr(ops, "squared_relu_mlp", lambda x, key, value: called.append((key, value)) or x)
    mix = ChannelMix(ModelConfig(variant="v7", n_layer=1, n_embd=64, vocab_size=16))
    begin = lambda x, branch, mixes, last, cu_seqlens: (x, [x], last)  # noqa: E731
    x = torch.zeros(1, 2, 64)
    mix(begin, x, None, x[:, 0], None)
    assert [*map(id, called.pop())] == [id(mix.key.weight), id(mix.value.weight)]
    seen = []
    mix.key.register_forward_hook(lambda *_: seen.append(True))
    torch.nn.init.zeros_(mix.key.weight), torch.nn.init.zeros_(mix.value.weight)
    mix(begin, x, None, x[:, 0], None)
    assert called == []
    assert seen == [True]


# On a GPU


@pytest.fixture
def hopper():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no CUDA device of compute capability 9.0")
    cuda.library((9, 0))
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize(("n_tokens", "depth", "hidden"), [(4096, 768, 3072), (2049, 200, 512), (5000, 2048, 8192)])
def test_the_kernels_are_as_exact_as_pytorch(hopper, n_tokens, depth, hidden):
    *parts, d_y = problem(n_tokens, depth, hidden, hopper)
    check_errors(lambda *leaves: squared_relu_mlp(*leaves, impl="cuda"), parts, d_y)


@pytest.mark.gpu
def test_the_kernels_give_pytorchs_numbers(hopper):
    x, key, value, d_y = problem(4096, 768, 3072, hopper)
    squares, roots = torch.ops.heron.squared_relu(x, key)
    close(roots, (x @ key.T).relu())
    assert torch.equal(squares, roots.square())
    d, again = torch.ops.heron.squared_relu_backward(d_y, value, roots)
    close(d, (d_y @ value) * 2 * roots)
    assert torch.equal(again, squares)
