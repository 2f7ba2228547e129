"""The CUDA form of ROSA's soft gradients: its source on a CPU and, where there is one, on a GPU, by the definition."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from heron.ops import _build
from heron.ops.rosa import soft
from heron.ops.rosa.gradients import rosa_qkv, value_gradient
from heron.ops.rosa.soft import soft_choice, soft_gradients, soft_gradients_cuda, soft_gradients_torch
from tests.ops.kernels import ARCHITECTURES, check_that_a_failed_build_is_said_once, check_that_none_spills, needs_nvcc

EMULATOR = Path(__file__).parent / "emulator"
GPU = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
EPS = torch.finfo(torch.float32).eps


def emulated(most_blocks=1024):
    """The kernel's source compiled for a CPU, as a function of what soft_gradients_cuda takes."""
    flags, depends = ("-O1", "-U_FORTIFY_SOURCE"), [soft.SOURCE, EMULATOR / "hardware.h", EMULATOR / "warp.h"]
    library = _build.load_c_library("rosa_soft_emulated", [EMULATOR / "rosa_soft.cpp"], flags, depends)
    pointer, small, large = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.rosa_soft_emulated.restype = ctypes.c_char_p
    library.rosa_soft_emulated.argtypes = [*[pointer] * 6, large, small, small, large, *[pointer] * 3]

    def gradients(q, k, v, slope, middle, no_match):
        inputs = [x.contiguous() for x in (q, k, v, slope, middle, no_match)]
        found = [torch.full_like(slope, torch.nan) for _ in range(3)]
        pointers = [[x.data_ptr() for x in tensors] for tensors in (inputs, found)]
        error = library.rosa_soft_emulated(*pointers[0], *slope.shape, most_blocks, *pointers[1])
        assert error is None, error.decode()
        return found

    return gradients


@pytest.fixture(scope="module", params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def kernel(request):
    """A device, and the kernel for it."""
    if request.param == "cuda":
        return GPU, soft_gradients_cuda
    if _build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    return torch.device("cpu"), emulated()


def streams_of(kind, n_streams, n_tokens, n_bits):
    """q, k and v, (S, T) uint8."""
    q, k, v = (torch.randint(2**n_bits, (n_streams, n_tokens), dtype=torch.uint8) for _ in range(3))
    if kind == "constant":
        q[:] = k[:] = 2**n_bits - 1
    elif kind == "periodic":
        q[:] = k[:] = torch.arange(n_tokens) % 7 % 2**n_bits
    elif kind == "nearly constant":
        q, k, v = ((x == 0).to(torch.uint8) for x in (q, k, v))
    elif kind == "one long match":
        k[:, 1:] = q[:, :-1]
    return q, k, v


KINDS = ("random", "constant", "periodic", "nearly constant", "one long match")


def problem(kind, n_streams, n_tokens, n_bits):
    """What soft_gradients_cuda takes, on a CPU."""
    torch.manual_seed(n_tokens + n_bits)
    others = [torch.randn(n_streams, n_tokens) for _ in range(2)]
    return *streams_of(kind, n_streams, n_tokens, n_bits), torch.randn(n_streams, n_tokens, n_bits), *others


def wide(arguments):
    return [x.double() if x.is_floating_point() else x for x in arguments]


def check_error(gradients, arguments, device):
    """Against fp64, and what eager PyTorch's is in fp32."""
    ours = gradients(*(x.to(device) for x in arguments))
    theirs = soft_gradients_torch(*arguments, max_match=None)
    for got, eager, truth in zip(ours, theirs, soft_gradients_torch(*wide(arguments), max_match=None), strict=True):
        assert torch.isfinite(got).all()
        assert (got.cpu() - truth).norm() <= 2 * (eager - truth).norm() + 2 * EPS * truth.norm()


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 31, 32, 33, 65, 127])
@pytest.mark.parametrize("n_bits", [1, 2, 4, 5, 8])
def test_the_kernel_has_at_most_twice_the_error_of_eager_pytorch(kernel, n_tokens, n_bits):
    device, gradients = kernel
    for kind in KINDS:
        check_error(gradients, problem(kind, 8, n_tokens, n_bits), device)


@pytest.mark.parametrize(
    ("kind", "n_bits"),
    [*((kind, 4) for kind in KINDS), *((kind, n) for kind in ("random", "one long match") for n in (1, 3, 6, 7))],
)
def test_a_warp_of_the_kernel_may_have_several_tiles_of_a_row(kernel, kind, n_bits):
    device, gradients = kernel
    check_error(gradients, problem(kind, 4, 300, n_bits), device)


def test_a_stream_gives_the_same_bits_whatever_else_its_block_has_run(kernel):
    device, gradients = kernel
    few_blocks = gradients if device.type == "cuda" else emulated(most_blocks=2)  # on a GPU they are 1024
    n_streams = 2100 if device.type == "cuda" else 5
    arguments = [x.to(device) for x in problem("nearly constant", n_streams, 70, 4)]
    together = few_blocks(*arguments)
    assert all(map(torch.equal, few_blocks(*arguments), together))
    for stream in (0, 1, n_streams - 2, n_streams - 1):
        alone = gradients(*(x[stream : stream + 1] for x in arguments))
        assert all(torch.equal(x[0], y[stream]) for x, y in zip(alone, together, strict=True))


# -- the choice ------------------------------------------------------------------------------------------------------


def test_a_limit_and_fp64_are_left_to_pytorch_and_it_is_said():
    for device, where in ((GPU, "CUDA"), (torch.device("cpu"), "C++")):
        limited, exact = soft_choice(device, 9, max_match=8), soft_choice(device, 9, dtype=torch.float64)
        assert limited.impl == exact.impl == "torch"
        assert f"not in {where} (it counts matches of every length, and max_match is below" in limited.reason
        assert f"not in {where} (it takes fp32, not torch.float64)" in exact.reason


def test_a_limit_that_no_match_reaches_is_none():
    if _build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    assert soft_choice(torch.device("cpu"), 9, max_match=9).impl == "cpu"


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_no_streams_and_no_symbols_have_no_gradients(shape):
    symbols, slope = torch.zeros(shape, dtype=torch.uint8), torch.zeros(*shape, 4)
    found = soft_gradients(symbols, symbols, symbols, slope, slope[..., 0], slope[..., 0], None)
    assert [x.shape for x in found] == [(*shape, 4)] * 3


def test_without_nvcc_auto_says_so_once(monkeypatch, capsys):
    check_that_a_failed_build_is_said_once(
        monkeypatch, capsys, soft.FORM, lambda: soft_choice(GPU, 9), "torch", "rosa_soft"
    )


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernels_compile_without_spilling(tmp_path, arch):
    forms = [f"soft<{bits}>(Problem)" for bits in (1, 4, 8)]
    check_that_none_spills(tmp_path, soft.SOURCE, forms, arch, includes=["algorithm"])


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["random", "constant"])
def test_a_long_stream_on_a_gpu(kind):
    arguments = [x.cuda() for x in problem(kind, 2, 1300, 4)]
    ours, theirs = soft_gradients_cuda(*arguments), soft_gradients_torch(*arguments, max_match=None)
    for got, eager, truth in zip(ours, theirs, soft_gradients_torch(*wide(arguments), max_match=None), strict=True):
        assert (got - truth).norm() <= 2 * (eager - truth).norm() + 2 * EPS * truth.norm()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", [1, 4])
def test_a_layer_on_a_gpu_repeats_bit_for_bit_and_the_host_waits_for_nothing(bits):
    torch.manual_seed(0)
    leaves = [torch.randn(4, 200, 64, device=GPU, requires_grad=True) for _ in "qkv"]
    e, gy = torch.randn(64, device=GPU, requires_grad=True), torch.randn(4, 200, 64, device=GPU)

    def step():
        y = rosa_qkv(*leaves, e, bits=bits)
        return y, *torch.autograd.grad(y, (*leaves, e), gy)

    first = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first, again))


@pytest.mark.gpu
@needs_gpu
def test_values_on_a_gpu_have_the_gradient_that_they_have_on_a_cpu():
    torch.manual_seed(0)
    v, gy, height, src = torch.randn(3, 90, 8), torch.randn(3, 90, 8), torch.randn(8), torch.randint(-1, 40, (6, 90))
    found = value_gradient(v.cuda(), gy.cuda(), height.cuda(), src.cuda(), 4)
    torch.testing.assert_close(found.cpu(), value_gradient(v, gy, height, src, 4))
