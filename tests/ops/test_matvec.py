"""heron.ops.matvec: its definition by fp64, its kernel by both, on a CPU by its source."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from heron.errors import KernelError
from heron.ops import _build, matvec
from heron.ops._products import ACTIVATIONS
from heron.ops.codes import GROUP, CodedMatrix
from heron.ops.few_rows import few_rows
from heron.ops.matvec import Product, cuda, matvec_choice
from tests.ops.kernels import (
    ARCHITECTURES,
    BFLOAT16,
    HALF,
    check_that_a_failed_build_is_said_once,
    check_that_none_spills,
    needs_nvcc,
)
from tests.ops.products import AsIfOnAGpu, by_source, compare, products

EMULATOR = Path(__file__).parent / "emulator"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def emulated():
    """matvec, computed by the kernel's source on a CPU."""
    depends = [cuda.SOURCE, _build.PRODUCTS, EMULATOR / "hardware.h", EMULATOR / "single_token.h"]
    flags = ("-O1", "-U_FORTIFY_SOURCE")
    library = _build.load_c_library("matvec_emulated", [EMULATOR / "matvec.cpp"], flags, depends)
    library.matvec_emulated.restype = ctypes.c_char_p

    def multiply(some):
        is_bf16 = some[0].x.dtype == BF16
        return by_source(library.matvec_emulated, some, int(is_bf16), len(some), with_codes=True)

    return multiply


SMALL = [(3, 8), (1, 768), (9, 40), (9, 2056), (17, 264), (3, 8192), (5, 16), (24, 4104)]
MIXED = [(3, 64, 4), (9, 40), (17, 320, 8), (17, 320, 4), (1, 768, 8), (5, 2112, 4), (3, 8192, 8), (3, 8192, 4)]


@pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shapes", [SMALL, MIXED], ids=["floating", "with codes"])
def test_the_kernels_source_on_a_cpu_multiplies(emulated, dtype, seed, shapes):
    some = products(shapes, 1, dtype, seed=seed)
    together = emulated(some)
    compare(together, some)
    for y, product in zip(together, some, strict=True):
        assert torch.equal(emulated([product])[0], y)


@pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_stays_so(emulated, activation):
    weight = torch.zeros(3, 8)
    weight[1, 7], weight[2, 0] = torch.nan, torch.inf
    some = [Product(torch.ones(1, 8), weight, activation)]
    (got,), (want,) = emulated(some), matvec(some)
    assert torch.equal(got.nan_to_num(nan=-7.0), want.nan_to_num(nan=-7.0))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("seed", range(3))
def test_the_definition_multiplies(dtype, seed):
    some = products([*SMALL, *MIXED, (4, 7), (1, 1)], 1, dtype, seed=seed)
    compare(matvec(some), some)
    assert matvec([]) == []


def test_the_definition_computes_fp64_in_fp64():
    product = Product(torch.full((1, 3), 1 / 3).double(), torch.full((2, 3), 1 / 3).double())
    assert (matvec([product])[0] - product.x @ product.weight.T).abs().max() < 1e-15


CODES, NIBBLES = CodedMatrix.of(torch.ones(4, 64)), CodedMatrix.of(torch.ones(4, 64), 4)


def test_ops_that_read_no_codes_say_so():
    with pytest.raises(KernelError, match="few_rows: product 0: weight must be floating, got one of codes"):
        few_rows([Product(torch.zeros(2, 64), CODES)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.zeros(4, 8).t()), r"product 1: weight must be \(out, in\).*got \(8, 4\).*strides \(1, 8\)"),
        (dict(weight=torch.zeros(0, 8)), r"weight must be .* not empty"),
        (dict(x=torch.zeros(8)), r"x must be \(1, 8\) and contiguous, got \(8,\)"),
        (dict(x=torch.zeros(1, 8).half()), "all tensors must be torch.float32 on cpu; x is torch.float16 on cpu"),
        (dict(factor=torch.zeros(1, 3)), r"factor must be \(1, 4\) and contiguous, got \(1, 3\)"),
        (dict(add=torch.zeros(1, 8)[:, ::2]), r"add must be \(1, 4\) and contiguous"),
        (dict(add=torch.zeros(1, 4, device="meta")), "add is torch.float32 on meta"),
        (dict(weight=CODES._replace(codes=CODES.codes.long())), r"in 8 bits must be .* got \(4, 64\) torch.int64 and"),
        (dict(weight=CODES._replace(scales=torch.zeros(4, 2).bfloat16())), r"int8 and \(4, 2\) torch.bfloat16"),
        (dict(weight=CODES._replace(scales=torch.zeros(4, 1))), r"int8 and \(4, 1\) torch.float32"),
        (dict(weight=CODES._replace(codes=torch.zeros(4, 96).to(torch.int8))), r"got \(4, 96\) torch.int8"),
        (
            dict(weight=NIBBLES._replace(codes=CODES.codes)),
            r"in 4 bits must be \(out, in / 4\) torch.int16 .* got \(4, 64\)",
        ),
        (dict(weight=NIBBLES._replace(scales=torch.zeros(4, 2).bfloat16())), r"int16 and \(4, 2\) torch.bfloat16"),
        (
            dict(weight=NIBBLES._replace(levels=torch.zeros(8))),
            r"levels must be \(16,\) torch.int8, .* got \(8,\) torch.float32",
        ),
        (dict(weight=CODES), r"x must be \(1, 64\) and contiguous, got \(1, 8\)"),
        (dict(activation="relu"), "activation must be none, tanh, sigmoid, squared relu; got 'relu'"),
    ],
)
def test_unfit_products_are_refused_in_words(change, message):
    good = Product(torch.zeros(1, 8), torch.zeros(4, 8))
    with pytest.raises(KernelError, match=message):
        matvec([good, good._replace(**change)])


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        ("fast", "impl must be auto, reference, cuda; got 'fast'"),
        ("cuda", 'impl="cuda": it needs tensors on a CUDA device, got cpu'),
    ],
)
def test_a_form_that_does_not_run_here_is_refused(impl, message):
    with pytest.raises(KernelError, match=message):
        matvec([Product(torch.zeros(1, 8), torch.zeros(4, 8))], impl=impl)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(4, 8), None),
        (torch.zeros(4, 24576, dtype=BF16), None),
        (torch.zeros(4, 96)[:, :8], None),
        (torch.zeros(4, 8).double(), "it takes fp32, bf16 and fp16, not torch.float64"),
        (torch.zeros(4, 12), "a multiple of 8, up to 12288 of torch.float32, not of 12"),
        (torch.zeros(4, 24584, dtype=BF16), "up to 24576 of torch.bfloat16, not of 24584"),
        (torch.zeros(4, 9)[:, :8], "begin at multiples of 16 bytes"),
        (torch.zeros(4, 16)[:, 1:9], "begin at multiples of 16 bytes"),
        (CODES, None),
        (NIBBLES, None),
        (NIBBLES._replace(levels=torch.zeros(17, dtype=torch.int8)[1:]), "levels that begin at a multiple of 16 bytes"),
        (CodedMatrix.of(torch.zeros(1, 12352)), "up to 12288 of torch.float32, not of 12352"),
    ],
)
def test_weights_that_the_kernel_cannot_read_are_named(weight, reason):
    said = cuda.why_not(GPU, weight.dtype if torch.is_tensor(weight) else FP32, [weight])
    assert said is None if reason is None else reason in said


def test_a_kernel_that_cannot_be_built_is_said_once(monkeypatch, capsys):
    said = cuda.FORM, lambda: matvec_choice([AsIfOnAGpu()], BF16), "reference", "matvec"
    check_that_a_failed_build_is_said_once(monkeypatch, capsys, *said)


# What nvcc makes of the source


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernel_compiles_without_spilling(tmp_path, arch):
    forms = [f"matvec<{t}>(const __grid_constant__ Products)" for t in ("float", BFLOAT16, HALF)]
    check_that_none_spills(tmp_path, cuda.SOURCE, forms, arch, [_build.EARLY, _build.PRODUCTS])


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_kernel_multiplies_the_longest_vectors(gpu, dtype):
    longest = 48 * 1024 // dtype.itemsize
    some = products([(17, longest), (2, 8), (17, longest, 8), (17, longest, 4)], 1, dtype, gpu)
    assert cuda.why_not(GPU, dtype, [product.weight for product in some]) is None
    compare(matvec(some, impl="cuda"), some)


@pytest.mark.gpu
@pytest.mark.parametrize("n_in", [8, 768, 2048, 8192])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_kernel_multiplies(gpu, n_in, dtype):
    shapes = [(n_out, n_in) for n_out in (1, 3, 96, 2048, 96, 65536, 3, 2048, 1, 96)]  # more than one launch
    if n_in % GROUP == 0:
        shapes += [(*shape, bits) for bits in (8, 4) for shape in shapes]
    some = products(shapes, 1, dtype, gpu, seed=n_in)
    together = matvec(some, impl="cuda")
    compare(together, some)
    for y, product in zip(together, some, strict=True):
        assert torch.equal(matvec([product], impl="cuda")[0], y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kind", [(), (8,), (4,)], ids=["floating", "8 bits", "4 bits"])
def test_a_chain_of_kernels_in_a_graph_is_the_chain(gpu, dtype, kind):
    """Each waits for the one before it, however early it began."""
    matrices = products([(1024, 1024, *kind)] * 6, 1, dtype, gpu)
    source = torch.randn(1, 1024, device=gpu).to(dtype)

    def chain(x):
        for product in matrices:
            (x,) = matvec([product._replace(x=x, activation="tanh", factor=None)], impl="cuda")
        return x

    def one_by_one(x):
        for product in matrices:
            (x,) = matvec([product._replace(x=x, activation="tanh", factor=None)], impl="cuda")
            torch.cuda.synchronize()
        return x

    one_by_one(source)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(source)
    for seed in range(20):
        source.copy_(torch.randn(1, 1024, generator=torch.Generator().manual_seed(seed)))
        want = one_by_one(source)
        graph.replay()
        assert torch.equal(got, want)
