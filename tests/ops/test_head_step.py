"""heron.ops.head_step: its definition by WKV7 and PyTorch's layers in fp64, its kernel by the definition."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from heron.errors import KernelError
from heron.ops import _build, head_step, wkv7
from heron.ops.head_step import HeadInputs, HeadWeights, cuda, head_step_choice
from heron.ops.head_step.reference import rounded_at_random
from tests.ops.kernels import (
    ARCHITECTURES,
    BFLOAT16,
    check_that_a_failed_build_is_said_once,
    check_that_none_spills,
    needs_nvcc,
)

EMULATOR = Path(__file__).parent / "emulator"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
GPU = torch.device("cuda")


def problem(n, H, N, dtype, mixes=True, device="cpu", seed=0):
    generator = torch.Generator(device).manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    inputs = [2 * numbers(n, H * N).to(dtype) for _ in range(8 if mixes else 6)]
    *weights, v0 = ((0.5 + numbers(H * N)).to(dtype) for _ in range(8))
    wkv = numbers(n, H, N, N).to(torch.promote_types(dtype, FP32))
    return HeadInputs(*inputs), HeadWeights(*weights, 64e-5, v0 if mixes else None), wkv


def exact(inputs, weights, wkv):
    """y and the new state in fp64, by the operator and the layers that the model is made of."""
    n, H, N, _ = wkv.shape
    r, w, k, v, iclr, gate = (x.double() for x in inputs[:6])
    w0, a0, k_k, k_a, r_k, norm_weight, norm_bias = (x.double() for x in weights[:7])
    if inputs.v_first is not None:
        v = v + (inputs.v_first.double() - v) * (weights.v0.double() + inputs.value.double()).sigmoid()
    w, iclr, removal_key = w0 + w, (a0 + iclr).sigmoid(), F.normalize((k * k_k).view(n, H, N), dim=-1).view(n, H * N)
    k = k * (1 + (iclr - 1) * k_a)
    parts = (x.view(n, 1, H, N) for x in (r, w, k, v, -removal_key, removal_key * iclr))
    y, state = wkv7(*parts, wkv.double(), impl="reference")
    y = F.group_norm(y.view(n, H * N), H, norm_weight, norm_bias, weights.eps)
    bonus = (r * k * r_k).view(n, H, N).sum(-1, keepdim=True) * v.view(n, H, N)
    return (y + bonus.view(n, H * N)) * gate, state


def compare(got, state, want, tolerances):
    for mine, true, tolerance in zip((got, state), want, tolerances, strict=True):
        assert (mine.double() - true).norm() <= tolerance * true.norm()


TOLERANCES = {FP64: (1e-12, 1e-12), FP32: (2e-6, 1e-6), FP16: (1e-3, 1e-6), BF16: (5e-3, 1e-6)}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("n", "H", "N", "mixes"), [(1, 3, 16, True), (2, 2, 64, False), (3, 1, 5, True)])
def test_the_definition_is_what_the_model_is_made_of(dtype, n, H, N, mixes):
    inputs, weights, wkv = problem(n, H, N, dtype, mixes)
    want = exact(inputs, weights, wkv)
    got = head_step(inputs, weights, wkv)
    assert got.dtype == dtype
    compare(got, wkv, want, TOLERANCES[dtype])


def check_that_new_states_go_elsewhere(step, inputs, weights, wkv):
    """They are those of a step in place, to the bit, and the old ones stay."""
    before, elsewhere = wkv.clone(), torch.full_like(wkv, torch.nan)
    got = step(inputs, weights, wkv, elsewhere)
    assert torch.equal(wkv, before)
    assert torch.equal(got, step(inputs, weights, wkv))
    assert torch.equal(wkv, elsewhere)


@pytest.mark.parametrize("dtype", [FP64, BF16])
def test_new_states_go_where_they_should(dtype):
    check_that_new_states_go_elsewhere(head_step, *problem(2, 3, 16, dtype))


@pytest.fixture(scope="module")
def emulated():
    """head_step, computed by the kernel's source on a CPU."""
    depends = [cuda.SOURCE, _build.HEAD, EMULATOR / "hardware.h", EMULATOR / "single_token.h"]
    flags = ("-O1", "-U_FORTIFY_SOURCE")
    library = _build.load_c_library("head_step_emulated", [EMULATOR / "head_step.cpp"], flags, depends)
    library.head_step_emulated.restype = ctypes.c_char_p

    def step(inputs, weights, wkv, new_wkv=None, drawn=None):
        parts = [None if x is None else x.data_ptr() for x in (*inputs, *weights[:7], weights.v0)]
        y = torch.full_like(inputs.r, torch.nan)
        n, H, N, _ = wkv.shape
        error = library.head_step_emulated(
            int(y.dtype == BF16), (ctypes.c_void_p * len(parts))(*parts), ctypes.c_void_p(y.data_ptr()),
            ctypes.c_void_p(wkv.data_ptr()), ctypes.c_void_p((wkv if new_wkv is None else new_wkv).data_ptr()),
            None if drawn is None else ctypes.c_void_p(drawn.data_ptr()), n, (n + 2) // 3, H, N,
            ctypes.c_float(weights.eps),
        )  # fmt: skip
        assert error is None, error.decode()
        return y

    return step


@pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("n", "H", "N", "mixes"), [(8, 3, 16, True), (4, 2, 64, False), (1, 1, 128, True)])
def test_the_kernels_source_on_a_cpu_steps(emulated, dtype, n, H, N, mixes):
    inputs, weights, wkv = problem(n, H, N, dtype, mixes)
    want = exact(inputs, weights, wkv)
    compare(emulated(inputs, weights, wkv), wkv, want, TOLERANCES[dtype])
    check_that_new_states_go_elsewhere(emulated, inputs, weights, wkv)


def check_states_in_bf16(step, n, H, N, device="cpu"):
    """A step from them is one in fp32, whose states are rounded to neighbours, all sequences and tokens otherwise."""
    inputs, weights, wkv = problem(n, H, N, BF16, True, device)
    wkv, drawn = wkv.to(BF16), torch.arange(n, device=device)
    want = wkv.float()
    y = step(inputs, weights, want)
    went_up = []
    for token in (0, 100):
        new = torch.full_like(wkv, torch.nan)
        assert torch.equal(step(inputs, weights, wkv, new, drawn + token), y)
        assert ((new.float() - want).abs() <= 2.0**-7 * want.abs()).all()  # less than a unit in the last place
        went_up.append(new.float() > want)
        assert 0.4 < went_up[-1].float().mean() < 0.6
    for one, other in (went_up, went_up[0][:2]):
        assert 0.3 < (one != other).float().mean() < 0.7


def check_that_small_steps_add_up(step, device="cpu"):
    """What is less than half a unit in the last place of a state is not lost: on average it is there."""
    inputs, weights, _ = problem(8, 1, 16, BF16, False, device)
    zeros = torch.zeros_like(inputs.r)
    inputs = HeadInputs(*(zeros for _ in inputs[:6]))._replace(v=zeros + 2.0**-6, k=zeros + 1, w=zeros - 40)
    weights = weights._replace(w0=weights.w0 * 0, k_k=weights.k_k * 0, k_a=weights.k_a * 0)  # nothing decays
    wkv = torch.full((8, 1, 16, 16), 16.0, dtype=BF16, device=device)  # in bf16 its neighbour is 1 / 8 away
    for token in range(40):
        step(inputs, weights, wkv, wkv, torch.arange(8, device=device) + 1000 * token)
    assert (wkv.float().mean() - 16 - 40 * 2.0**-6).abs() < 0.05
    assert wkv.float().std() > 0.1


def test_the_definition_keeps_states_in_bf16():
    check_states_in_bf16(head_step, 2, 3, 16)
    check_that_small_steps_add_up(head_step)
    not_finite = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, torch.finfo(FP32).max]])
    got = rounded_at_random(not_finite, torch.tensor([3]))
    assert torch.equal(got[0, :4].nan_to_num(nan=7.0), not_finite[0, :4].to(BF16).nan_to_num(nan=7.0))


@pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
def test_the_kernels_source_on_a_cpu_keeps_states_in_bf16(emulated):
    check_states_in_bf16(emulated, 2, 3, 16)
    check_states_in_bf16(emulated, 2, 1, 64)
    check_that_small_steps_add_up(emulated)


@pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
def test_a_removal_key_of_zeros_removes_nothing(emulated):
    inputs, weights, wkv = problem(1, 2, 16, FP32)
    inputs.k[:, :16] = 0
    want = exact(inputs, weights, wkv)
    compare(emulated(inputs, weights, wkv), wkv, want, TOLERANCES[FP32])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.zeros(1, 16)), r"k must be \(1, 32\) torch.float32 and contiguous, got \(1, 16\)"),
        (dict(gate=torch.zeros(1, 64)[:, ::2]), "gate must be .* contiguous"),
        (dict(v_first=None), "value, v_first and v0 come together, or not at all"),
        (dict(r=torch.zeros(1, 32, device="meta")), "must be on cpu; r is on meta"),
        (dict(k_a=torch.zeros(32).half()), r"k_a must be of 32 values, torch.float32 and contiguous, got \(32,\)"),
        (dict(v0=torch.zeros(16)), r"v0 must be of 32 values, torch.float32 and contiguous, got \(16,\)"),
        (dict(wkv=torch.zeros(1, 2, 16, 8)), r"wkv must be \(n, H, N, N\), got \(1, 2, 16, 8\)"),
        (dict(wkv=torch.zeros(1, 2, 16, 16).double()), "wkv must be .* torch.float32"),
        (dict(new_wkv=torch.zeros(2, 2, 16, 16)), r"new_wkv must be \(1, 2, 16, 16\) .*, got \(2, 2, 16, 16\)"),
        (dict(drawn=torch.zeros(1, dtype=torch.int64)), "drawn comes with states in torch.bfloat16, and these are"),
        (dict(wkv=torch.zeros(1, 2, 16, 16, dtype=BF16)), "drawn comes with states in torch.bfloat16, and these are"),
        (dict(impl="fast"), "impl must be auto, reference, cuda; got 'fast'"),
        (dict(impl="cuda"), 'impl="cuda": it needs tensors on a CUDA device, got cpu'),
    ],
)
def test_unfit_arguments_are_refused_in_words(change, message):
    inputs, weights, wkv = problem(1, 2, 16, FP32)
    inputs = inputs._replace(**{name: x for name, x in change.items() if name in HeadInputs._fields})
    weights = weights._replace(**{name: x for name, x in change.items() if name in HeadWeights._fields})
    with pytest.raises(KernelError, match=message):
        head_step(
            inputs,
            weights,
            change.get("wkv", wkv),
            change.get("new_wkv"),
            change.get("drawn"),
            impl=change.get("impl", "auto"),
        )


def test_no_sequences_give_nothing():
    assert head_step(*problem(0, 2, 16, FP32)).shape == (0, 32)


def test_heads_that_the_kernel_does_not_know_are_named():
    assert cuda.why_not(GPU, BF16, 64) is None
    assert cuda.why_not(GPU, FP64, 64) == "it takes fp32, bf16 and fp16, not torch.float64"
    assert cuda.why_not(GPU, BF16, 48) == "it takes heads of 16, 32, 64, 128, not of 48"


def test_a_kernel_that_cannot_be_built_is_said_once(monkeypatch, capsys):
    said = (
        cuda.FORM,
        lambda: head_step_choice(torch.device("cuda")),
        "reference",
        "head_step",
    )
    check_that_a_failed_build_is_said_once(monkeypatch, capsys, *said)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernel_compiles_without_spilling(tmp_path, arch):
    sizes = [(t, size) for t in ("float", BFLOAT16) for size in (64, 128)]
    forms = [
        f"head_step<{t}, {s}, {size}>(const __grid_constant__ Problem)"
        for t, size in sizes
        for s in ("float", BFLOAT16)
    ]
    check_that_none_spills(tmp_path, cuda.SOURCE, forms, arch, [_build.EARLY, _build.HEAD])


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("N", cuda.HEAD_SIZES)
@pytest.mark.parametrize("mixes", [True, False])
def test_kernel_steps(dtype, N, mixes):
    inputs, weights, wkv = problem(5, 7, N, dtype, mixes, "cuda")
    before, want = wkv.clone(), exact(inputs, weights, wkv)
    got = head_step(inputs, weights, wkv, impl="cuda")
    compare(got, wkv, want, TOLERANCES[dtype])
    alone = [None if x is None else x[3:4].clone() for x in inputs]
    one = before[3:4].clone()
    assert torch.equal(head_step(HeadInputs(*alone), weights, one, impl="cuda")[0], got[3])
    assert torch.equal(one[0], wkv[3])
    check_that_new_states_go_elsewhere(head_step, inputs, weights, wkv)
    elsewhere = torch.full_like(before, torch.nan)
    assert torch.equal(head_step(inputs, weights, before, elsewhere, settled=True, impl="cuda"), got)
    compare(got, elsewhere, want, TOLERANCES[dtype])
    check_states_in_bf16(head_step, 3, 5, N, "cuda")
    check_that_small_steps_add_up(head_step, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernel_takes_no_sequences_and_refuses_states_that_begin_between_pieces():
    assert head_step(*problem(0, 2, 16, BF16, device="cuda"), impl="cuda").shape == (0, 32)
    inputs, weights, wkv = problem(1, 2, 16, BF16, device="cuda")
    between = torch.zeros(wkv.numel() + 1, device="cuda")[1:].view(wkv.shape)
    with pytest.raises(RuntimeError, match="head_step: states must begin at multiples of 16 bytes"):
        head_step(inputs, weights, between, impl="cuda")
