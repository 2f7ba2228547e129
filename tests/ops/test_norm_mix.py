"""heron.ops.norm_mix: its definition in fp64, its kernel by that."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path

import pytest
import torch

from heron.errors import KernelError
from heron.ops import _build, norm_mix
from heron.ops.norm_mix import cuda, norm_mix_choice
from tests.ops.kernels import (
    BFLOAT16,
    HALF,
    check_that_a_failed_build_is_said_once,
    check_that_none_spills,
    needs_nvcc,
)

EMULATOR = Path(__file__).parent / "emulator"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
GPU = torch.device("cuda")
TOLERANCES = {FP64: 1e-12, FP32: 1e-6, FP16: 1e-3, BF16: 6e-3}


def problem(n, m, C, dtype, device="cpu", seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(n, C), (C,), (C,), (m, C), (n, C)]
    x, weight, bias, mixes, last = (torch.randn(*s, generator=generator, device=device) for s in shapes)
    return [part.to(dtype) for part in (3 * x + 5, weight, bias)] + [1e-5, mixes.to(dtype), last.to(dtype)]


def exact(x, weight, bias, eps, mixes, last):
    x, weight, bias, mixes, last = (part.double() for part in (x, weight, bias, mixes, last))
    now = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + eps).sqrt() * weight + bias
    return torch.stack([now + (last - now) * mix for mix in mixes] or [now])[: len(mixes)], now


def compare(got, last, want):
    for mine, true in zip((got, last), want, strict=True):
        assert mine.shape == true.shape
        assert (mine.double() - true).norm() <= TOLERANCES[mine.dtype] * true.norm()


def check_that_the_token_goes_elsewhere(run, arguments):
    """It is that of a call in place, to the bit, and so is what is mixed; the last one stays."""
    before, elsewhere = arguments[-1].clone(), torch.full_like(arguments[-1], torch.nan)
    mixed = run(*arguments, elsewhere)
    assert torch.equal(arguments[-1], before)
    assert torch.equal(run(*arguments), mixed)
    assert torch.equal(arguments[-1], elsewhere)


@pytest.fixture(scope="module")
def emulated():
    """norm_mix, computed by the kernel's source on a CPU."""
    depends = [cuda.SOURCE, EMULATOR / "hardware.h", EMULATOR / "single_token.h"]
    library = _build.load_c_library(
        "norm_mix_emulated", [EMULATOR / "norm_mix.cpp"], ("-O1", "-U_FORTIFY_SOURCE"), depends
    )
    library.norm_mix_emulated.restype = ctypes.c_char_p

    def run(x, weight, bias, eps, mixes, last, new_last=None):
        mixed = torch.full((len(mixes), *x.shape), torch.nan, dtype=x.dtype)
        tensors = [
            ctypes.c_void_p(part.data_ptr())
            for part in (x, weight, bias, mixes, last, last if new_last is None else new_last, mixed)
        ]
        sizes = (len(x), len(mixes), x.shape[1], ctypes.c_float(eps))
        error = library.norm_mix_emulated(int(x.dtype == BF16), *tensors, *sizes)
        assert error is None, error.decode()
        return mixed

    return run


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("n", "m", "C"), [(1, 6, 32), (3, 1, 50), (2, 2, 7), (2, 0, 8)])
def test_the_definition_norms_and_mixes(dtype, n, m, C):
    arguments = problem(n, m, C, dtype)
    want = exact(*arguments)
    compare(norm_mix(*arguments), arguments[-1], want)
    check_that_the_token_goes_elsewhere(norm_mix, arguments)


@pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("n", "m", "C"), [(1, 6, 64), (2, 1, 2050), (3, 2, 6), (1, 8, 2056), (2, 0, 64)])
def test_the_kernels_source_on_a_cpu_norms_and_mixes(emulated, dtype, n, m, C):
    arguments = problem(n, m, C, dtype)
    want = exact(*arguments)
    compare(emulated(*arguments), arguments[-1], want)
    check_that_the_token_goes_elsewhere(emulated, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(8)), r"x must be \(n, C\) and mixes \(m, C\), floating; got \(8,\)"),
        (dict(bias=torch.zeros(4)), r"bias must be \(8,\) torch.float32 and contiguous, got \(4,\)"),
        (dict(last=torch.zeros(2, 16)[:, ::2]), r"last must be \(2, 8\) .* contiguous"),
        (dict(new_last=torch.zeros(2, 4)), r"new_last must be \(2, 8\) .*, got \(2, 4\)"),
        (dict(mixes=torch.zeros(3, 8).half()), "mixes must be .* torch.float16"),
        (dict(weight=torch.zeros(8, device="meta")), "must be on cpu; weight is on meta"),
        (dict(impl="fast"), "impl must be auto, reference, cuda; got 'fast'"),
        (dict(impl="cuda"), 'impl="cuda": it needs tensors on a CUDA device, got cpu'),
    ],
)
def test_unfit_arguments_are_refused_in_words(change, message):
    arguments = dict(zip(("x", "weight", "bias", "eps", "mixes", "last"), problem(2, 3, 8, FP32), strict=True))
    with pytest.raises(KernelError, match=message):
        norm_mix(**(arguments | change))


def test_no_sequences_give_no_tokens():
    assert norm_mix(*problem(0, 2, 8, FP32)).shape == (2, 0, 8)


def test_tokens_that_the_kernel_does_not_know_are_named():
    assert cuda.why_not(GPU, BF16, 768) is None
    assert cuda.why_not(GPU, FP64, 768) == "it takes fp32, bf16 and fp16, not torch.float64"
    assert cuda.why_not(GPU, BF16, 7) == "it takes an even number of channels, not 7"


def test_a_kernel_that_cannot_be_built_is_said_once(monkeypatch, capsys):
    said = (
        cuda.FORM,
        lambda: norm_mix_choice(torch.device("cuda")),
        "reference",
        "norm_mix",
    )
    check_that_a_failed_build_is_said_once(monkeypatch, capsys, *said)


@needs_nvcc
def test_the_kernel_compiles_without_spilling(tmp_path):
    widths = [("float", 2), ("float", 4), (BFLOAT16, 2), (BFLOAT16, 8), (HALF, 8)]
    forms = [f"norm_mix<{t}, {width}>(const __grid_constant__ Problem)" for t, width in widths]
    check_that_none_spills(tmp_path, cuda.SOURCE, forms, "90a", [_build.EARLY])


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("C", [2, 768, 2048, 8194])
@pytest.mark.parametrize("m", [0, 1, 6, 7])
def test_kernel_norms_and_mixes(dtype, C, m):
    arguments = problem(5, m, C, dtype, "cuda")
    alone = [part[3:4].clone() if i in (0, 5) else part for i, part in enumerate(arguments)]
    want = exact(*arguments)
    got = norm_mix(*arguments, impl="cuda")
    compare(got, arguments[-1], want)
    assert torch.equal(norm_mix(*alone, impl="cuda")[:, 0], got[:, 3])
    assert torch.equal(alone[-1][0], arguments[-1][3])
    check_that_the_token_goes_elsewhere(partial(norm_mix, impl="cuda"), arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernel_takes_no_sequences_and_refuses_what_begins_between_two_numbers():
    assert norm_mix(*problem(0, 2, 8, BF16, "cuda"), impl="cuda").shape == (2, 0, 8)
    _, *rest = problem(2, 2, 8, BF16, "cuda")
    with pytest.raises(RuntimeError, match="norm_mix: tensors must begin at multiples of 4 bytes"):
        norm_mix(torch.zeros(17, dtype=BF16, device="cuda")[1:].view(2, 8), *rest, impl="cuda")
