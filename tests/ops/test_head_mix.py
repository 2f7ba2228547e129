"""heron.ops.head_mix: its definition by its equations, its kernels by fp64, on a GPU and, emulated, without one."""

from __future__ import annotations

import ctypes
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heron.errors import KernelError
from heron.ops import _build, _choice, head_mix
from heron.ops.head_mix import _FORMS, HeadInputs, HeadWeights, cuda, head_mix_choice
from heron.ops.spans import Span
from tests.ops import emulator
from tests.ops.kernels import (
    ARCHITECTURES,
    BFLOAT16,
    check_that_a_failed_build_is_said_once,
    check_that_none_spills,
    kernels_launched,
    needs_nvcc,
)
from tests.ops.spans_on_threads import on_threads
from tests.ops.test_wkv7_span import edges_of

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
EMULATOR = Path(emulator.__file__).parent
TOLERANCE = {FP32: 3e-6, BF16: 8e-3}  # of the norm of the difference
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
needs_compiler = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")


def problem(B, T, H, N, dtype=FP64, first=True, seed=0, device="cpu"):
    """Inputs, weights and a state as leaves, and gradients of y and of the final state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, mean=0.0):
        numbers = mean + scale * torch.randn(*shape, generator=generator, dtype=FP64)
        return numbers.to(device, dtype).requires_grad_()

    C = H * N
    inputs = HeadInputs(*(normal(B, T, C) if first or i < 6 else None for i in range(8)))
    weights = HeadWeights(
        w0=normal(1, 1, C, mean=-2.0),
        a0=normal(1, 1, C),
        k_k=normal(1, 1, C, scale=0.3, mean=0.7),
        k_a=normal(1, 1, C, scale=0.3, mean=1.0),
        r_k=normal(H, N, scale=0.3),
        norm_weight=normal(C, scale=0.3, mean=1.0),
        norm_bias=normal(C),
        eps=64e-5,
        v0=normal(1, 1, C) if first else None,
    )
    states = [normal(B, H, N, N).detach().to(torch.promote_types(dtype, FP32)) for _ in range(2)]
    return inputs, weights, states[0].requires_grad_(), (normal(B, T, C).detach(), states[1])


def leaves_of(inputs, weights, state):
    """By name."""
    named = {**inputs._asdict(), **weights._asdict(), "initial state": state}
    return {name: x for name, x in named.items() if isinstance(x, Tensor)}


def gradients_of(out, leaves, gradients):
    return dict(zip(leaves, torch.autograd.grad(out, tuple(leaves.values()), gradients), strict=True))


def results(inputs, weights, state, gradients, **options):
    """What comes out, and the gradient of each leaf, by name."""
    y, final = head_mix(inputs, weights, state, **options)
    return {"y": y, "state": final} | gradients_of((y, final), leaves_of(inputs, weights, state), gradients)


def in_fp64(inputs, weights, state, gradients):
    def converted(x):
        return x.detach().double().requires_grad_() if isinstance(x, Tensor) else x

    given = HeadInputs(*map(converted, inputs)), HeadWeights(*map(converted, weights)), converted(state)
    return *given, tuple(gradient.double() for gradient in gradients)


def distances(got, want):
    pairs = {name: (got[name].detach().double(), want[name].detach()) for name in want}
    return {name: float((a - b).norm() / b.norm().clamp_min(1e-12)) for name, (a, b) in pairs.items()}


def compare_with_fp64(got, given, dtype, offsets=None):
    """Within TOLERANCE, or twice the error of PyTorch in the same dtype."""
    want = results(*in_fp64(*given), impl="reference", cu_seqlens=offsets)
    assert got.keys() == want.keys()
    assert all(got[name].dtype == (FP32 if "state" in name else dtype) for name in got)
    away, eager = distances(got, want), distances(results(*given, impl="reference", cu_seqlens=offsets), want)
    assert all(away[name] <= max(TOLERANCE[dtype], 2 * eager[name]) for name in away), (away, eager)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_definition_is_its_equations(first, impl):
    B, T, H, N = 2, 3, 2, 5
    inputs, weights, state, _ = problem(B, T, H, N, first=first)
    y, final = head_mix(inputs, weights, state, impl=impl)
    flat = {name: x.flatten() for name, x in weights._asdict().items() if isinstance(x, Tensor)}
    for b, h in ((0, 1), (1, 0)):
        own = slice(h * N, (h + 1) * N)
        S = state[b, h]
        weight = {name: x[own] for name, x in flat.items()}
        for t in range(T):
            r, w, k, v, iclr, gate, *_ = (None if x is None else x[b, t, own] for x in inputs)
            if first:
                share = torch.sigmoid(weight["v0"] + inputs.value[b, t, own])
                v = (1 - share) * v + share * inputs.v_first[b, t, own]
            iclr = torch.sigmoid(weight["a0"] + iclr)
            removal_key = k * weight["k_k"] / (k * weight["k_k"]).square().sum().sqrt()
            k = k * (1 - weight["k_a"]) + k * iclr * weight["k_a"]
            decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(weight["w0"] + w))
            S = S * decay - torch.outer(S @ removal_key, removal_key * iclr) + torch.outer(v, k)
            read = S @ r
            normed = (read - read.mean()) / (read.var(correction=0) + weights.eps).sqrt()
            normed = normed * weight["norm_weight"] + weight["norm_bias"]
            want = (normed + (r * k * weight["r_k"]).sum() * v) * gate
            torch.testing.assert_close(y[b, t, own], want, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(final[b, h], S, rtol=1e-11, atol=1e-12)


def test_without_a_state_it_starts_from_zeros():
    inputs, weights, state, _ = problem(1, 3, 2, 16)
    for got, want in zip(head_mix(inputs, weights), head_mix(inputs, weights, torch.zeros_like(state)), strict=True):
        assert torch.equal(got, want)


def packed(lengths, H, N, dtype=FP64, first=True, device="cpu"):
    """A problem of sequences of these lengths, packed, with a state for each; and their cu_seqlens."""
    inputs, weights, _, (d_y, _) = problem(1, sum(lengths), H, N, dtype, first, device=device)
    *_, state, (_, d_state) = problem(len(lengths), 1, H, N, dtype, first, seed=1, device=device)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    return (inputs, weights, state, (d_y, d_state)), offsets


def results_alone(inputs, weights, state, gradients, offsets, **options):
    """As `results` of packed sequences, with each in a call of its own."""
    ys, finals = [], []
    for i, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if begin == end:
            finals.append(state[i : i + 1])
            continue
        own = HeadInputs(*(None if x is None else x[:, begin:end] for x in inputs))
        y, final = head_mix(own, weights, state[i : i + 1], **options)
        ys.append(y)
        finals.append(final)
    out = torch.cat(ys, dim=1), torch.cat(finals)
    return {"y": out[0], "state": out[1]} | gradients_of(out, leaves_of(inputs, weights, state), gradients)


LENGTHS = [0, 3, 1, 0, 13, 0]


@pytest.mark.parametrize("first", [True, False])
def test_packed_sequences_are_as_each_alone(first):
    given, offsets = packed(LENGTHS, 2, 16, first=first)
    got, want = results(*given, cu_seqlens=offsets), results_alone(*given, offsets)
    assert max(distances(got, want).values()) < 1e-11


@pytest.fixture(scope="module")
def kernels_on_cpu():
    """The kernels' source, compiled for a CPU, as the operators on CPU tensors; in strips of three tokens.

    It gives a list to which each call of a backward adds how many sums over tokens it was asked for.
    """
    summed = []
    depends = [cuda.SOURCE, _build.STRIPS, EMULATOR / "hardware.h", EMULATOR / "single_token.h"]
    flags = ("-O1", "-U_FORTIFY_SOURCE")
    emulated = _build.load_c_library("head_mix_emulated", [EMULATOR / "head_mix.cpp"], flags, depends)
    emulated.head_mix_emulated.restype = ctypes.c_char_p

    def pointers(tensors):
        return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))

    def run(name, mixes, inputs, weights, outputs, sums, of_heads, head_size, eps=0.0):
        like, channels = inputs[0], weights[0].numel()
        rows, strip = like.numel() // channels, 3
        assert all(x.is_contiguous() and x.dtype == like.dtype for x in (*inputs, *weights))
        shape = (*of_heads.shape[:2], channels) if name == "after_backward" else (rows, channels)
        out = [torch.full(shape, torch.nan, dtype=like.dtype) for _ in range(outputs)]
        out += [torch.full((channels,), torch.nan, dtype=like.dtype) for _ in range(sums)]
        of_strip = torch.full((-(-rows // strip), sums, channels), torch.nan)
        if "backward" in name:
            summed.append(sums)
        with emulator.ONE_AT_A_TIME:
            error = emulated.head_mix_emulated(
                name.encode(), int(like.dtype == BF16), int(mixes), pointers(inputs), pointers(weights), len(weights),
                pointers(out), ctypes.c_void_p(None if of_heads is None else of_heads.data_ptr()),
                ctypes.c_void_p(of_strip.data_ptr() if sums else None),
                (ctypes.c_int * 4)(rows, channels, head_size, strip), ctypes.c_float(eps),
            )  # fmt: skip
        assert error is None, error.decode()
        return out

    def before(inputs, weights, head_size):
        mixes = len(inputs) == 6
        out = run("before", mixes, inputs, weights, 5 if mixes else 4, 0, None, head_size)
        return [x.view(inputs[0].shape) for x in out]

    def after(inputs, weights, head_size, eps):
        (y,) = run("after", False, inputs, weights, 1, 0, None, head_size, eps)
        return [y.view(inputs[-1].shape)]

    def after_backward(inputs, weights, head_size, eps, of_weights):
        B, T, C = inputs[-1].shape
        of_heads, sums = torch.full((B, T, C // head_size, 2), torch.nan), 3 if of_weights else 0
        return [*run("after_backward", False, inputs, weights, 2, sums, of_heads, head_size, eps), of_heads]

    def before_backward(inputs, weights, of_heads, head_size, of_weights):
        mixes = len(inputs) == 14
        outputs, sums = (6, 5) if mixes else (4, 4)
        out = run("before_backward", mixes, inputs, weights, outputs, sums if of_weights else 0, of_heads, head_size)
        return [x.view(inputs[0].shape) if i < outputs else x for i, x in enumerate(out)]

    library = torch.library.Library("heron", "IMPL")
    for name, form in zip(
        ("before", "after", "after_backward", "before_backward"),
        (before, after, after_backward, before_backward),
        strict=True,
    ):
        library.impl(f"head_mix_{name}", form, "CPU")
    yield summed
    library._destroy()


@pytest.fixture
def emulated(kernels_on_cpu, monkeypatch):
    """impl="cuda" runs on a CPU."""
    monkeypatch.setattr(cuda.FORM, "require", lambda *_: None)


SHAPES = [(3, 1, 3, 16), (3, 5, 1, 64), (3, 33, 1, 64), (1, 33, 3, 16), (1, 5, 2, 128), (1, 4, 40, 32)]


@needs_compiler
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_the_kernels_source_on_a_cpu_is_near_fp64(emulated, shape, dtype, first):
    given = problem(*shape, dtype, first)
    got = results(*given, impl="cuda")
    compare_with_fp64(got, given, dtype)
    again = results(*given, impl="cuda")
    assert all(torch.equal(got[name], again[name]) for name in got)


@needs_compiler
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_keys_of_zeros_are_no_numbers_to_divide_by(emulated, dtype):
    given = problem(1, 2, 2, 16, dtype)
    with torch.no_grad():
        given[0].k[0, 1, :16] = 0
    compare_with_fp64(results(*given, impl="cuda"), given, dtype)


@needs_compiler
@pytest.mark.parametrize("output", [0, 1])
def test_the_gradient_of_one_output_alone(emulated, output):
    *given, gradients = problem(1, 12, 1, 16, FP32)
    leaves = tuple(leaves_of(*given).values())

    def gradient(impl):
        out = head_mix(*given, impl=impl)[output]
        return torch.autograd.grad(out, leaves, gradients[output], allow_unused=True, materialize_grads=True)

    for got, want in zip(gradient("cuda"), gradient("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()) + 1e-12)


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_without_gradients_it_is_the_same_and_nothing_is_kept(emulated, tokens):
    *given, _ = problem(2, tokens, 1, 16, FP32)
    want = head_mix(*given, impl="cuda")
    with torch.no_grad():
        got = head_mix(*given, impl="cuda")
    assert all(not one.requires_grad for one in got)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, [1, 2, 0, 3]], ids=str)
def test_packed_sequences_by_the_kernels_source_are_near_fp64(emulated, dtype, first, lengths):
    given, offsets = packed(lengths, 2, 16, dtype, first)
    compare_with_fp64(results(*given, impl="cuda", cu_seqlens=offsets), given, dtype, offsets)
    with torch.no_grad():
        got = head_mix(*given[:3], offsets, "cuda")
    for one, other in zip(got, head_mix(*given[:3], offsets, "cuda"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 if dtype == BF16 else 1e-5)


def in_spans(given, cuts, offsets=None, call=head_mix):
    """As `results`, of spans whose holders are threads."""
    inputs, weights, state, (d_y, d_final) = given
    stretches = list(itertools.pairwise(cuts))

    def job(i, name):
        begin, end = stretches[i]
        edges, cu_seqlens, own = None, None, slice(0, len(state))
        if offsets is not None:
            edges, cu_seqlens = edges_of(offsets, begin, end)
            first = max(n for n, offset in enumerate(offsets) if offset <= begin)
            own = slice(first, first + len(cu_seqlens) - 1)
        mine = HeadInputs(*(None if x is None else x[:, begin:end].detach().requires_grad_() for x in inputs))
        shared = HeadWeights(*(x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in weights))
        leaves = leaves_of(mine, shared, state[own].detach().requires_grad_())
        y, final = call(mine, shared, leaves["initial state"], cu_seqlens, "cuda", span=Span(name, edges))
        of_final = d_final[own].clone()
        if end < cuts[-1] and (offsets is None or end not in offsets):
            of_final[-1 if offsets else slice(None)] = 0  # it goes on
        return y, final, own, gradients_of((y, final), leaves, (d_y[:, begin:end], of_final))

    done = on_threads(len(stretches), job)
    found = {"y": torch.cat([y for y, *_ in done], dim=1), "state": torch.zeros_like(d_final)}
    for name in done[0][-1]:
        parts = [gradients[name] for *_, gradients in done]
        if name == "initial state":
            found[name] = torch.zeros_like(d_final)
        else:
            found[name] = torch.cat(parts, dim=1) if name in HeadInputs._fields else torch.stack(parts).sum(dim=0)
    for _, final, own, gradients in done:
        found["state"][own] = final
        found["initial state"][own] += gradients["initial state"]
    return found


@needs_compiler
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("dtype", "size"), [(FP32, 16), (BF16, 64)], ids=["general", "tensor"])
@pytest.mark.parametrize("cuts", [(0, 33, 80), (0, 1, 32, 79, 80)], ids=str)
def test_spans_by_the_kernels_source_are_near_fp64(emulated, monkeypatch, cuts, dtype, size, first):
    given = problem(2, 80, 1, size, dtype, first)
    compare_with_fp64(in_spans(given, cuts), given, dtype)
    monkeypatch.setattr(cuda.wkv7_cuda, "_segments", lambda heads, tokens: -(-tokens // 32))
    compare_with_fp64(in_spans(given, cuts), given, dtype)


@needs_compiler
@pytest.mark.parametrize(("dtype", "size"), [(FP32, 16), (BF16, 64)], ids=["general", "tensor"])
@pytest.mark.parametrize("cuts", [(0, 33, 80), (0, 1, 32, 79, 80)], ids=str)
@pytest.mark.parametrize("lengths", [[80], [33, 47], [3, 40, 1, 20, 16]], ids=str)
def test_spans_of_packed_sequences_by_the_kernels_source_are_near_fp64(
    emulated, monkeypatch, lengths, cuts, dtype, size
):
    given, offsets = packed(lengths, 1, size, dtype)
    monkeypatch.setattr(cuda.wkv7_cuda, "_segments", lambda heads, tokens: -(-tokens // 32))
    compare_with_fp64(in_spans(given, cuts, offsets.tolist()), given, dtype, offsets)


@needs_compiler
def test_spans_are_traced_with_their_gradients(emulated):
    given = problem(1, 30, 1, 16, FP32)
    want = in_spans(given, (0, 30))
    torch._dynamo.reset()
    run = torch.compile(head_mix, backend="aot_eager", fullgraph=True, dynamic=False)
    got = in_spans(given, (0, 30), call=run)
    assert all(torch.equal(got[name], want[name]) for name in want)


@needs_compiler
def test_only_some_leaves_may_want_a_gradient(emulated):
    inputs, weights, state, gradients = problem(1, 3, 2, 16, FP32)
    every = results(inputs, weights, state, gradients, impl="cuda")
    leaves = leaves_of(inputs, weights, state)
    wanted = {name: leaves.pop(name) for name in ("k_a", "v")}
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    got = gradients_of(head_mix(inputs, weights, state, impl="cuda"), wanted, gradients)
    assert all(torch.equal(got[name], every[name]) for name in wanted)


def with_frozen_weights(given, call=head_mix):
    """The gradient of each leaf but the weights, by name, which must be the bits that it has beside theirs."""
    inputs, weights, state, gradients = given
    every = results(*given, impl="cuda")
    for weight in weights:
        if isinstance(weight, Tensor):
            weight.requires_grad_(False)
    wanted = leaves_of(inputs, HeadWeights(*(None,) * len(weights)), state)
    got = gradients_of(call(inputs, weights, state, impl="cuda"), wanted, gradients)
    assert all(torch.equal(got[name], every[name]) for name in wanted)


@needs_compiler
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_frozen_weights_are_not_summed_for(emulated, kernels_on_cpu, first, traced):
    given = problem(2, 12, 2, 16, FP32, first)
    torch._dynamo.reset()
    traceable = torch.compile(head_mix, backend="aot_eager", fullgraph=True, dynamic=False)
    kernels_on_cpu.clear()
    with_frozen_weights(given, traceable if traced else head_mix)
    assert kernels_on_cpu == [3, 5 if first else 4, 0, 0]


@needs_compiler
def test_layouts_change_nothing(emulated):
    inputs, weights, state, gradients = problem(2, 5, 2, 16, FP32)
    want = results(inputs, weights, state, gradients, impl="cuda")
    moved = HeadInputs(*(x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for x in inputs))
    gradients = tuple(x.transpose(0, 2).contiguous().transpose(0, 2) for x in gradients)
    got = results(moved, weights, state, gradients, impl="cuda")
    assert all(torch.equal(got[name], want[name]) for name in want)


@needs_compiler
@pytest.mark.parametrize(("tokens", "first"), [(12, True), (3, False)])
def test_it_is_traced_with_its_gradients(emulated, tokens, first):
    *given, gradients = problem(2, tokens, 2, 16, FP32, first)
    want = results(*given, gradients, impl="cuda")
    torch._dynamo.reset()
    run = torch.compile(lambda *a: head_mix(*a, impl="cuda"), backend="aot_eager", fullgraph=True, dynamic=False)
    out = run(*given)
    got = {"y": out[0], "state": out[1]} | gradients_of(out, leaves_of(*given), gradients)
    assert all(torch.equal(got[name], want[name]) for name in want)
    with torch.no_grad():
        torch.testing.assert_close(run(*given), out)


@needs_compiler
def test_it_can_be_computed_again_in_the_backward(emulated):
    *given, gradients = problem(1, 12, 2, 16, FP32)
    want = results(*given, gradients, impl="cuda")
    out = checkpoint(head_mix, *given, None, "cuda", use_reentrant=False)
    got = gradients_of(out, leaves_of(*given), gradients)
    assert all(torch.equal(got[name], want[name]) for name in got)


@needs_compiler
def test_a_model_learns_the_same_through_it(emulated, monkeypatch, random_model):
    tokens, targets = torch.randint(0, 37, (2, 2, 11), generator=torch.Generator().manual_seed(0))
    model = random_model()
    model.loss(tokens, targets).backward()
    want = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(cuda.FORM, "choice", lambda *_: _choice.Choice("cuda", "emulated"))
    calls = []
    monkeypatch.setitem(_FORMS, "cuda", lambda *a, **b: (calls.append(a), cuda.head_mix_cuda(*a, **b))[1])
    model.loss(tokens, targets).backward()
    assert len(calls) == 3  # layers
    got = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


# Choices and errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(impl="fast"), "impl must be auto, reference, cuda; got 'fast'"),
        (dict(impl="cuda"), 'impl="cuda": it needs tensors on a CUDA device, got cpu; use impl="auto"'),
        (dict(r=torch.zeros(1, 32)), r"r must be \(B, T, C\) with T >= 1, got \(1, 32\)"),
        (dict(k=torch.zeros(1, 2, 16)), r"k must have the shape of r, \(1, 3, 32\); got \(1, 2, 16\)"),
        (dict(v_first=None), "value, v_first and v0 come together, or not at all"),
        (dict(v0=None), "value, v_first and v0 come together, or not at all"),
        (dict(r_k=torch.zeros(32)), r"r_k must be \(H, N\) with H N = C = 32, got \(32,\)"),
        (dict(k_a=torch.zeros(16)), r"k_a must have C = 32 values; got \(16,\)"),
        (dict(state=torch.zeros(1, 2, 16, 8)), r"state must be .* \(1, 2, 16, 16\)"),
        (dict(gate=torch.zeros(1, 3, 32).half(), impl="cuda"), "in the dtype of r, torch.float32, and gate is torch"),
    ],
)
def test_unfit_arguments_are_refused_in_words(change, message):
    inputs, weights, state, _ = problem(1, 3, 2, 16, FP32)
    inputs = inputs._replace(**{name: x for name, x in change.items() if name in HeadInputs._fields})
    weights = weights._replace(**{name: x for name, x in change.items() if name in HeadWeights._fields})
    with pytest.raises(KernelError, match=message):
        head_mix(inputs, weights, change.get("state", state), impl=change.get("impl", "auto"))


def test_heads_that_the_kernels_do_not_know_are_named():
    reason = cuda.why_not(torch.device("cuda"), torch.float16, 64)
    assert reason == "it takes fp32 and bf16, not torch.float16"
    assert cuda.why_not(torch.device("cuda"), BF16, 48) == "it takes heads of 16, 32, 64, 128, not of 48"


def test_mixed_dtypes_take_the_definition(monkeypatch):
    monkeypatch.setattr(cuda.FORM, "choice", lambda *_: _choice.Choice("cuda", "for once"))
    inputs, weights, state, _ = problem(1, 3, 2, 16, FP32)
    half = inputs._replace(k=inputs.k.detach().half().float())  # the same number in both
    want = head_mix(half, weights, state, impl="reference")
    got = head_mix(half._replace(k=half.k.half()), weights, state)
    torch.testing.assert_close(got[0], want[0], rtol=1e-3, atol=1e-3)


def test_kernels_that_cannot_be_built_are_said_once(monkeypatch, capsys):
    monkeypatch.setattr(cuda.FORM, "why_not", lambda *_: None)
    said = (
        cuda.FORM,
        lambda: head_mix_choice(torch.device("cuda")),
        "reference",
        "head_mix",
    )
    check_that_a_failed_build_is_said_once(monkeypatch, capsys, *said)


def test_without_wkv7s_kernels_there_are_none(monkeypatch):
    def fail(*_):
        raise KernelError("no nvcc for WKV7")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda.FORM, "why_not", lambda *_: None)
    monkeypatch.setattr(cuda._build, "load_kernels_for", lambda *_: None)
    monkeypatch.setattr(cuda.wkv7_cuda, "library", fail)
    cuda.library.cache_clear()
    choice = head_mix_choice(torch.device("cuda"))
    assert choice.impl == "reference"
    assert "no nvcc for WKV7" in choice.reason


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernels_compile_without_spilling(tmp_path, arch):
    kernels = ("before<{}, true>", "before<{}, false>", "after<{}>", "after_backward<{}>")
    kernels += ("before_backward<{}, true>", "before_backward<{}, false>")
    types = ("float", BFLOAT16)
    forms = [f"run_{kernel.format(t)}(const __grid_constant__ Problem<{t}>)" for kernel in kernels for t in types]
    check_that_none_spills(tmp_path, cuda.SOURCE, forms, arch, ["algorithm", _build.STRIPS], before="using std::min;")


# On a GPU


@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=needs_gpu, id=str(shape)) for shape in (*SHAPES, (2, 700, 5, 64))]
)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("first", [True, False])
def test_the_kernels_are_near_fp64(shape, dtype, first):
    given = problem(*shape, dtype, first, device="cuda")
    got, again = results(*given, impl="cuda"), results(*given, impl="cuda")
    assert all(torch.equal(got[name], again[name]) for name in got)
    compare_with_fp64(got, given, dtype)


@pytest.mark.parametrize("first", [pytest.param(first, marks=needs_gpu) for first in (True, False)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_packed_sequences_by_the_kernels_are_near_fp64(first, dtype):
    given, offsets = packed([700, 1, 0, 33, 0, 265], 3, 64, dtype, first, device="cuda")
    compare_with_fp64(results(*given, impl="cuda", cu_seqlens=offsets), given, dtype, offsets)


@pytest.mark.parametrize("first", [pytest.param(first, marks=needs_gpu) for first in (True, False)])
def test_the_kernels_are_near_fp64_at_a_models_size(first):
    given = problem(4, 512, 12, 64, BF16, first, device="cuda")
    compare_with_fp64(results(*given, impl="cuda"), given, BF16)


@pytest.mark.parametrize("first", [pytest.param(first, marks=needs_gpu) for first in (True, False)])
def test_on_a_gpu_frozen_weights_are_not_summed_for(first):
    given = problem(2, 300, 3, 64, BF16, first, device="cuda")
    results(*given, impl="cuda")
    assert kernels_launched(lambda: with_frozen_weights(given)).count("add_up_strips") == 2  # beside theirs


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=needs_gpu) for tokens in (3, 70)])
def test_a_graph_replays_it(tokens):
    cuda.FORM.require(torch.device("cuda"), BF16, 64)  # nothing is built or loaded while a graph is recorded
    given = problem(2, tokens, 3, 64, BF16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = results(*given, impl="cuda")
    graph.replay()
    want = results(*given, impl="cuda")
    assert all(torch.equal(got[name], want[name]) for name in want)
