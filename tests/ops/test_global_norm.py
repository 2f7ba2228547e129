"""The norm of many tensors and the verdict over a step: each form by fp64, the kernels' source on a CPU too."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
import torch

from heron.errors import KernelError
from heron.ops import _build
from heron.ops.global_norm import cuda, global_norm, verdict

EMULATOR = Path(__file__).parent / "emulator"
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES = [1, 7, 8, 769, 16383, 16384, 16385, 40000]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def tensors_of(sizes, device=CPU, misaligned=False, seed=0):
    """bf16 and fp32 in turns, each of another scale."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, size in enumerate(sizes):
        values = (torch.randn(size + 1, generator=generator) * 10.0 ** (i % 5 - 3)).to(device)
        values = values.bfloat16() if i % 2 else values
        made.append(values[1:] if misaligned else values[1:].clone())
    return made


def exact(tensors):
    return float(torch.sqrt(sum(tensor.double().square().sum() for tensor in tensors)))


def emulated():
    """The kernels' source compiled for a CPU, as functions of what global_norm and verdict take."""
    flags = ("-O1", "-U_FORTIFY_SOURCE", "-ffp-contract=off")
    depends = [cuda.SOURCE, _build.CHUNKS, EMULATOR / "hardware.h", EMULATOR / "numbers.h"]
    library = _build.load_c_library("global_norm_emulated", [EMULATOR / "global_norm.cpp"], flags, depends)
    for function in (library.global_norm_emulated, library.verdict_emulated):
        function.restype = ctypes.c_char_p

    def place(tensor):
        return ctypes.c_void_p(tensor.data_ptr())

    def norm(tensors):
        n, out = len(tensors), torch.full((), math.nan)
        error = library.global_norm_emulated(
            n, (ctypes.c_void_p * n)(*(tensor.data_ptr() for tensor in tensors)),
            (ctypes.c_int64 * n)(*(tensor.numel() for tensor in tensors)),
            (ctypes.c_bool * n)(*(tensor.dtype == torch.bfloat16 for tensor in tensors)), place(out),
        )  # fmt: skip
        assert error is None, error.decode()
        return out

    def judge(loss, norm, limit, clip):
        out = torch.full((2,), math.nan)
        error = library.verdict_emulated(
            place(loss), place(norm), ctypes.c_double(limit), ctypes.c_double(clip), place(out)
        )
        assert error is None, error.decode()
        return out.unbind()

    return norm, judge


@pytest.fixture(scope="module", params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def kernels(request):
    """A device, and the kernels of global_norm and of verdict for it."""
    if request.param == "cuda":
        return GPU, lambda tensors: global_norm(tensors, "cuda"), lambda *given: verdict(*given, "cuda")
    if _build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    return CPU, *emulated()


def test_the_definition_is_the_root_of_all_squares():
    tensors = tensors_of(SIZES)
    assert float(global_norm(tensors, "reference")) == pytest.approx(exact(tensors), rel=1e-6)
    assert torch.equal(global_norm(tensors), global_norm(tensors, "reference"))


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, [5, 0, 70000], [3] * 1500], ids=["mixed", "empty", "many"])
def test_the_kernel_is_as_near_to_fp64_as_fp32_can_be(kernels, sizes, misaligned):
    device, norm, _ = kernels
    for seed in range(3):
        tensors = tensors_of(sizes, device, misaligned, seed)
        truth = exact(tensors)
        assert abs(float(norm(tensors)) - truth) <= 2**-23 * truth


def test_equal_values_give_equal_bits_in_either_dtype_wherever_they_lie(kernels):
    device, norm, _ = kernels
    tensors, moved = tensors_of(SIZES, device), tensors_of(SIZES, device, misaligned=True)
    first = norm(tensors)
    assert torch.equal(first, norm(moved))
    assert torch.equal(first, norm([tensor.float() for tensor in tensors]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3, 5, 7])
def test_a_value_that_is_not_finite_comes_through(kernels, place, value):
    device, norm, _ = kernels
    tensors = tensors_of(SIZES, device)
    tensors[place][-1] = value
    torch.testing.assert_close(float(norm(tensors)), abs(value), equal_nan=True)


def test_the_range_is_that_of_squares_in_fp32_of_one_chunk(kernels):
    device, norm, _ = kernels
    large = [torch.full((5,), 1e18, device=device), *(torch.full((1,), 1.8e19, device=device) for _ in range(9))]
    assert float(norm(large)) == pytest.approx(exact(large), rel=1e-6)  # the sum of all is beyond fp32
    assert float(norm([torch.full((1,), 2e19, device=device)])) == math.inf
    assert float(norm([torch.full((1,), 1e-20, device=device)])) == pytest.approx(1e-20, rel=1e-4)


@pytest.mark.parametrize("limit", [2.0, math.inf])
@pytest.mark.parametrize("clip", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 7.3, math.inf, math.nan])
@pytest.mark.parametrize("loss", [1.0, 2.0, 3.0, math.inf, -math.inf, math.nan])
def test_the_kernel_judges_as_the_definition_does(kernels, loss, norm, limit, clip):
    device, _, judge = kernels
    numbers = [torch.tensor(number, device=device) for number in (loss, norm)]
    (bad, divisor), wanted = judge(*numbers, limit, clip), verdict(*numbers, limit, clip, "reference")
    assert torch.equal(bad, wanted[0])
    torch.testing.assert_close(divisor, wanted[1], rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: global_norm([]), "wanted at least one tensor"),
        (lambda: global_norm([torch.zeros(1)], "gpu"), "impl must be auto, reference, cuda; got 'gpu'"),
        (lambda: global_norm([torch.zeros(1)], "cuda"), 'impl="cuda": it needs tensors on a CUDA device, got cpu'),
        (lambda: verdict(torch.zeros(()), torch.zeros(()), 1.0, 1.0, "gpu"), "impl must be auto, reference, cuda"),
    ],
)
def test_what_does_not_fit_is_refused(call, said):
    with pytest.raises(KernelError, match=said):
        call()
