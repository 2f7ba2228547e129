"""A linear layer in fp8: its errors against the definition and against fp64, inf and NaN, and arguments it refuses."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
import torch

from heron.errors import KernelError
from heron.ops import _build, fp8_linear
from heron.ops.fp8_linear import cuda, fp8_linear_reference, scaled, why_not_fp8
from tests.ops.kernels import check_that_none_spills, needs_nvcc

EMULATOR = Path(__file__).parent / "emulator"

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]
ROUNDED = 0.04  # numbers of 3 bits are away by 2^-4 / sqrt(3) of themselves at most, 2.7 % on the average: two make 3.8
IN_BF16 = {"cpu": 2.0**-8, "cuda": 2.0**-7}  # of y; the tensor cores of a GPU add up with fewer bits than fp32


def inputs(n=96, n_in=64, n_out=80, device="cpu", spread=0.0, seed=0):
    """x, weight and a gradient of y in bf16, the rows of each from exp(-2 spread) to exp(2 spread) times as large."""
    draw = torch.Generator().manual_seed(seed)

    def normal(rows, columns):
        scales = torch.exp(spread * torch.randn(rows, 1, generator=draw))
        return (scales * torch.randn(rows, columns, generator=draw)).to(device, torch.bfloat16)

    return normal(n, n_in), normal(n_out, n_in), normal(n, n_out)


def results(function, x, weight, d_y):
    """y and the gradients of x and weight."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight)]
    y = function(*leaves)
    y.backward(d_y)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def in_fp64(*given):
    """The same in fp64, on the CPU."""
    return [tensor.double().cpu() for tensor in given]


def error(got, truth):
    return ((got.double().cpu() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(96, 64, 80), (1, 16, 32), (45, 128, 16)], ids=str)
def test_y_is_the_product_of_numbers_in_e4m3_each_row_with_a_scale_of_its_own(device, sizes):
    x, weight, _ = inputs(*sizes, device=device, spread=3.0)
    wanted = fp8_linear_reference(*in_fp64(x, weight))
    row_by_row = (fp8_linear(x, weight).double().cpu() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert row_by_row.max() < IN_BF16[device]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_each_error_is_that_of_rounding_two_factors_once(device, spread):
    """Also where gradients differ from token to token by many orders of magnitude."""
    given = inputs(480, 128, 192, device, spread)
    true = results(torch.nn.functional.linear, *in_fp64(*given))
    for got, wanted in zip(results(fp8_linear, *given), true, strict=True):
        assert error(got, wanted) < ROUNDED


def test_gradients_are_those_of_the_rounded_x_and_weight():
    given = inputs(480, 128, 192)
    once = results(fp8_linear_reference, *in_fp64(*given))
    for got, wanted in zip(results(fp8_linear, *given)[1:], once[1:], strict=True):
        assert error(got, wanted) < 0.75 * ROUNDED  # of d_y alone


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [480, 45])
def test_y_may_be_the_product_in_bf16_and_the_gradients_stay(device, n):
    given = inputs(n, 128, 192, device, 1.0)
    y, *gradients = results(lambda *leaves: fp8_linear(*leaves, y_in_bf16=True), *given)
    assert error(y, torch.nn.functional.linear(*in_fp64(*given[:2]))) < 2.0**-8
    assert all(map(torch.equal, gradients, results(fp8_linear, *given)[1:]))
    exact = results(lambda *leaves: fp8_linear_reference(*leaves, y_in_bf16=True), *in_fp64(*given))
    for got, wanted in zip((y, *gradients), exact, strict=True):
        assert error(got, wanted) < 0.75 * ROUNDED


def test_a_small_loss_has_gradients_as_exact_as_a_large_one():
    x, weight, d_y = inputs()
    small = results(fp8_linear, x, weight, d_y * 2.0**-44)
    for got, wanted in zip(small[1:], results(fp8_linear, x, weight, d_y)[1:], strict=True):
        assert torch.equal(got * 2.0**44, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [1, 15, 33])
def test_any_number_of_tokens_gives_what_they_give_among_others(device, n):
    x, weight, d_y = inputs(48, device=device)
    of_few = results(fp8_linear, x[:n].view(1, n, -1), weight, d_y[:n].view(1, n, -1))
    d_y[n:] = 0.0
    of_all = results(fp8_linear, x, weight, d_y)
    assert torch.equal(of_few[0][0], of_all[0][:n])
    assert torch.equal(of_few[1][0], of_all[1][:n])
    assert torch.equal(of_few[2], of_all[2])


def test_rows_of_zeros_give_zeros_and_a_weight_of_zeros_learns():
    x, weight, d_y = inputs()
    x[3], d_y[5] = 0.0, 0.0
    y, d_x, _ = results(fp8_linear, x, weight, d_y)
    assert not y[3].any()
    assert not d_x[5].any()
    _, d_x, d_weight = results(fp8_linear, x, torch.zeros_like(weight), d_y)
    assert not d_x.any()
    assert error(d_weight, d_y.double().t() @ x.double()) < ROUNDED
    assert not any(map(torch.count_nonzero, results(fp8_linear, x, weight, torch.zeros_like(d_y))[1:]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_bad_number_makes_its_row_nan_and_all_gradients_that_it_is_in(device, bad):
    x, weight, d_y = inputs(device=device)
    of_x, of_weight, of_gradient = x.clone(), weight.clone(), d_y.clone()
    of_x[7, 2], of_weight[9, 4], of_gradient[7, 1] = bad, bad, bad
    y, _, d_weight = results(fp8_linear, of_x, weight, d_y)
    assert y.isnan().any(dim=1).nonzero().flatten().tolist() == [7]
    assert y[7].isnan().all()
    assert d_weight.isnan().any()
    y, d_x, _ = results(fp8_linear, x, of_weight, d_y)
    assert y.isnan().all(dim=0).nonzero().flatten().tolist() == [9]
    assert d_x.isnan().any()
    _, d_x, d_weight = results(fp8_linear, x, weight, of_gradient)
    assert d_x.isnan().any(dim=1).nonzero().flatten().tolist() == [7]
    assert d_weight.isnan().any()


def test_compiled_it_is_the_same():
    given = inputs(45)
    compiled = torch.compile(fp8_linear, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(results(compiled, *given), results(fp8_linear, *given), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_for_a_gpu_it_is_the_same():
    given = inputs(480, 128, 192, "cuda", 3.0)
    compiled = torch.compile(fp8_linear, fullgraph=True)
    for got, wanted in zip(results(compiled, *given), results(fp8_linear, *given), strict=True):
        assert torch.equal(got, wanted)


# -- the kernels that make operands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated():
    """rows_cuda and turned_cuda, computed by the kernels' source on a CPU."""
    if _build.find_compiler() is None:
        pytest.skip("no C++ compiler on the path")
    depends = [cuda.SOURCE, EMULATOR / "hardware.h", EMULATOR / "single_token.h"]
    library = _build.load_c_library(
        "fp8_operands_emulated", [EMULATOR / "fp8_operands.cpp"], ("-O1", "-U_FORTIFY_SOURCE"), depends
    )

    def run(function, x, *others, out):
        function.restype = ctypes.c_char_p
        pointers = (ctypes.c_void_p(None if part is None else part.data_ptr()) for part in (x, *others))
        error = function(*pointers, *map(ctypes.c_int64, x.shape), *out)
        assert error is None, error.decode()

    def rows(x, smallest):
        out, scales = torch.full(x.shape, torch.nan).to(torch.float8_e4m3fn), torch.full((len(x), 1), torch.nan)
        run(library.fp8_rows_emulated, x, out, scales, out=[ctypes.c_float(smallest)])
        return out, scales

    def turned(x, factors):
        out = torch.full((x.shape[1], x.shape[0]), torch.nan).to(x.dtype)
        run(library.fp8_turned_emulated, x, factors, out, out=[])
        return out

    return rows, turned


def same_numbers(got, wanted):
    """Whether these are the same bits of e4m3, but for the sign of a NaN."""
    bits = [torch.where(x.float().isnan(), 0x7F, x.contiguous().view(torch.uint8)) for x in (got, wanted)]
    return torch.equal(*bits)


def check_rows(rows, device, n, m):
    x, _, _ = inputs(n, m, 16, device, spread=20.0)
    x[0], x[1, m // 2], x[2, m - 1], x[3, 0] = 0.0, math.inf, math.nan, -math.inf
    x[4] = 448.0 * 2.0**20
    got, of_got = rows(x, scaled._SMALLEST)
    wanted, of_wanted = scaled.quantized(x.cpu())
    assert torch.equal(of_got.cpu(), of_wanted)
    assert same_numbers(got.cpu(), wanted)
    assert got[1:4].float().isnan().sum() == 3


def check_turned(turned, device, n, m):
    """All numbers that e4m3 has, in some order."""
    bits = torch.arange(n * m, device=device).mul(37).remainder(256).to(torch.uint8).view(n, m)
    x, factors = bits.view(torch.float8_e4m3fn), torch.exp2(-torch.arange(float(n), device=device).remainder(29))
    assert torch.equal(turned(x, None).view(torch.uint8), bits.t())
    assert same_numbers(turned(x, factors.view(n, 1)), (x.float() * factors.view(n, 1)).to(x.dtype).t())
    assert turned(x, torch.full_like(factors, math.nan)).float().isnan().all()


@pytest.mark.parametrize(("n", "m"), [(16, 16), (10, 272), (9, 2048)])
def test_the_kernels_source_on_a_cpu_rounds_rows(emulated, n, m):
    check_rows(emulated[0], "cpu", n, m)


@pytest.mark.parametrize(("n", "m"), [(16, 16), (144, 272)])
def test_the_kernels_source_on_a_cpu_turns_and_multiplies(emulated, n, m):
    check_turned(emulated[1], "cpu", n, m)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("n", "m"), [(16, 16), (144, 272), (4096, 2048)])
def test_the_kernels_round_rows_and_turn(n, m):
    cuda.FORM.require(torch.device("cuda"))
    check_rows(cuda.rows_cuda, "cuda", n, m)
    check_turned(cuda.turned_cuda, "cuda", n, m)


@needs_nvcc
def test_the_kernels_compile_without_spilling(tmp_path):
    check_that_none_spills(tmp_path, cuda.SOURCE, ["round_rows", "turn"], "90a", ["cuda_fp8.h"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(x=torch.zeros(4, 32)), r"wanted x \(..., 32\) for a weight of 48 x 32, both torch.bfloat16"),
        (dict(x=torch.zeros(4, 48, dtype=torch.bfloat16)), r"got x \(4, 48\) torch.bfloat16 on cpu"),
        (dict(weight=torch.zeros(40, 32, dtype=torch.bfloat16)), "must be multiples of 16, and it is 40 x 32"),
        (dict(weight=torch.zeros(48, 32)), "weight torch.float32 on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, told):
    fits = dict(x=torch.zeros(4, 32, dtype=torch.bfloat16), weight=torch.zeros(48, 32, dtype=torch.bfloat16))
    assert why_not_fp8(fits["weight"]) is None
    with pytest.raises(KernelError, match=told):
        fp8_linear(**{**fits, **change})
