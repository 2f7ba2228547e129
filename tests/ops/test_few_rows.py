"""heron.ops.few_rows: its definition by fp64, its kernel by both, on a CPU by its source."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from heron.errors import KernelError
from heron.ops import _build, _products, few_rows
from heron.ops._products import ACTIVATIONS
from heron.ops.few_rows import MOST, Product, cuda, few_rows_choice
from heron.ops.few_rows.cuda import by_registers
from tests.ops.kernels import (
    ARCHITECTURES,
    BFLOAT16,
    HALF,
    check_that_a_failed_build_is_said_once,
    check_that_none_spills,
    needs_nvcc,
)
from tests.ops.products import (
    AsIfOnAGpu,
    by_source,
    check_that_vectors_keep_their_bits,
    check_that_what_is_not_finite_stays_so,
    compare,
    exact,
    of_vectors,
    products,
)

EMULATOR = Path(__file__).parent / "emulator"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def library():
    """The kernel's source, compiled for a CPU."""
    depends = [cuda.SOURCE, cuda.SHARING, _build.PRODUCTS, EMULATOR / "hardware.h", EMULATOR / "single_token.h"]
    flags = ("-O1", "-U_FORTIFY_SOURCE")
    library = _build.load_c_library("few_rows_emulated", [EMULATOR / "few_rows.cpp"], flags, depends)
    library.few_rows_emulated.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def emulated(library):
    """few_rows, computed by the kernel's source on a CPU."""

    def multiply(some, part=256, most=8):
        return by_source(library.few_rows_emulated, some, len(some), len(some[0].x), part, most)

    return multiply


SMALL = [(3, 8), (65, 776), (70, 40), (9, 136)]
needs_compiler = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("n", [2, 9, 17, 32])
def test_the_kernels_source_on_a_cpu_multiplies(emulated, n):
    some = products(SMALL, n, BF16, seed=n)
    together = emulated(some)
    compare(together, some)
    for y, product in zip(together, some, strict=True):
        assert torch.equal(emulated([product])[0], y)


@needs_compiler
@pytest.mark.parametrize(("part", "most", "n"), [(64, 8, 5), (512, 2, 20), (8192, 1, 5), (8192, 1, 11), (8192, 1, 20)])
def test_every_way_to_share_a_matrix_out_multiplies(emulated, part, most, n):
    some = products([(40, 2312), (3, 1024), (67, 120)], n, BF16, seed=part)
    compare(emulated(some, part, most), some)


@needs_compiler
@pytest.mark.parametrize(
    ("n_out", "n_in", "parts"),
    [(2048, 2048, 4), (8192, 2048, 2), (2048, 8192, 4), (65536, 2048, 1), (96, 2048, 4), (2048, 96, 1), (2048, 256, 2)],
)
def test_rows_are_divided_as_the_documents_say(library, n_out, n_in, parts):
    assert library.few_rows_parts(n_out, n_in, cuda.PART, cuda.MOST_PARTS) == parts


@needs_compiler
def test_a_matrix_of_many_rows_multiplies(emulated):
    some = products([(64 * 512 + 1, 136)], 2, BF16)
    compare(emulated(some, 64), some)
    compare(emulated(some, 512), some)


@needs_compiler
def test_what_a_vector_gives_is_the_same_bits_whatever_is_beside_it(emulated):
    check_that_vectors_keep_their_bits(emulated, SMALL)


@needs_compiler
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_stays_so_in_the_kernels_source(emulated, activation):
    check_that_what_is_not_finite_stays_so(emulated, few_rows, activation)


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16])
@pytest.mark.parametrize("n", [1, 3, 70])
def test_the_definition_multiplies_several_vectors(dtype, n):
    some = products([*SMALL, (4, 7), (1, 1)], n, dtype, seed=n)
    compare(few_rows(some), some)
    assert few_rows([]) == []


def test_kernels_get_vectors_factors_and_adds_that_begin_at_multiples_of_16_bytes():
    odd = [torch.arange(9, dtype=BF16)[1:].view(2, 4) for _ in range(3)]
    product = Product(odd[0], torch.zeros(4, 4, dtype=BF16), factor=odd[1], add=odd[2])

    def launch(xs, weights, activations, factors, adds):
        for given in (*xs, *factors, *adds):
            assert given is None or (given.data_ptr() % 16 == 0 and torch.equal(given, odd[0]))
        assert factors[1] is None
        return list(weights)

    _products.launches([product, product._replace(factor=None)], 8, launch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(8)), r"few_rows: product 1: x must be \(2, 8\) and contiguous, got \(8,\)"),
        (dict(x=torch.zeros(3, 8)), r"x must be \(2, 8\) and contiguous, got \(3, 8\)"),
        (dict(factor=torch.zeros(1, 4)), r"factor must be \(2, 4\) and contiguous, got \(1, 4\)"),
        (dict(activation="relu"), "activation must be none, tanh, sigmoid, squared relu; got 'relu'"),
    ],
)
def test_unfit_products_of_several_vectors_are_refused_in_words(change, message):
    good = Product(torch.zeros(2, 8), torch.zeros(4, 8))
    with pytest.raises(KernelError, match=message):
        few_rows([good, good._replace(**change)])
    if "3, 8" not in message:
        with pytest.raises(KernelError, match="few_rows: product 0"):
            few_rows([good._replace(**change)])


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        ("fast", "impl must be auto, reference, cuda; got 'fast'"),
        ("cuda", 'impl="cuda": it needs tensors on a CUDA device, got cpu'),
    ],
)
def test_a_form_that_does_not_run_here_is_refused(impl, message):
    with pytest.raises(KernelError, match=message):
        few_rows([Product(torch.zeros(2, 8), torch.zeros(4, 8))], impl=impl)


@pytest.mark.parametrize(
    ("weight", "n", "reason"),
    [
        (torch.zeros(4, 8, dtype=BF16), MOST, None),
        (torch.zeros(4, 96, dtype=FP16)[:, :8], 2, None),
        (torch.zeros(4, 8), 2, "it takes bf16 and fp16, not torch.float32"),
        (torch.zeros(4, 8, dtype=BF16), MOST + 1, f"it takes 1 to {MOST} vectors, not {MOST + 1}"),
        (torch.zeros(4, 12, dtype=BF16), 2, "a multiple of 8, not of 12"),
        (torch.zeros(4, 9, dtype=BF16)[:, :8], 2, "begin at multiples of 16 bytes"),
        (torch.zeros(4, 16, dtype=BF16)[:, 1:9], 2, "begin at multiples of 16 bytes"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(weight, n, reason):
    said = cuda.why_not(GPU, weight.dtype, [weight], n)
    assert said is None if reason is None else reason in said


def test_a_kernel_that_cannot_be_built_is_said_once(monkeypatch, capsys):
    said = cuda.FORM, lambda: few_rows_choice([AsIfOnAGpu()], 2), "reference", "few_rows"
    check_that_a_failed_build_is_said_once(monkeypatch, capsys, *said)


# What nvcc makes of the source


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernel_compiles_without_spilling(tmp_path, arch):
    forms = [
        f"few_rows<{t}, {columns}>(const __grid_constant__ Products)"
        for t in (BFLOAT16, HALF)
        for columns in (8, 16, 32)
    ]
    headers = ["type_traits", *cuda.HEADERS]
    check_that_none_spills(tmp_path, cuda.SOURCE, forms, arch, headers, before="using Half = __half;")


# On a GPU


@pytest.fixture
def gpu(gpu):
    cuda.library(torch.cuda.get_device_capability())
    return gpu


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 32])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_kernel_multiplies_few_vectors(gpu, n, dtype):
    shapes = [(96, 2048), (1, 8), (2048, 2048), (77, 768), (2048, 96), (65, 8192), (640, 8192), (3000, 264), (5, 20000)]
    some = products(shapes, n, dtype, gpu, seed=n)  # more than one launch
    together = by_registers(some)
    compare(together, some)
    for y, product in zip(together, some, strict=True):
        assert torch.equal(by_registers([product])[0], y)
    compare(few_rows(some, impl="cuda"), some)


@pytest.mark.gpu
@pytest.mark.parametrize("part", [256, 512, 1024, 4096])
@pytest.mark.parametrize("most", [2, 4, 8])
def test_kernel_multiplies_however_a_matrix_is_shared_out(gpu, part, most):
    for n in (2, 16, 31):
        some = products([(2048, 2048), (8192, 2048), (2048, 8192), (65536, 1024)], n, BF16, gpu, seed=n)
        compare(by_registers(some, part, most), some)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_vector_on_a_gpu_gives_the_same_bits_whatever_is_beside_it(gpu, dtype):
    some = products([(2048, 2048), (96, 2048), (640, 8192), (513, 264)], MOST, dtype, gpu)
    for product in some:
        product.x[20] = torch.nan
    together = by_registers(some)
    for chosen in ([3], [31, 3], [*range(9)], [*range(18)]):  # not the one that is no number
        for alone, beside in zip(by_registers(of_vectors(some, chosen)), together, strict=True):
            assert torch.equal(alone, beside[chosen])


@pytest.mark.gpu
def test_few_rows_are_at_most_twice_as_far_from_fp64_as_pytorchs(gpu):
    some = [p._replace(activation="none", factor=None, add=None) for p in products([(2048, 8192)], 32, BF16, gpu)]
    (x, weight, *_), (want, _) = some[0], exact(some[0])
    mine, theirs = ((y.double() - want).norm() for y in (by_registers(some)[0], x @ weight.T))
    assert mine <= 2 * theirs


@pytest.mark.gpu
@pytest.mark.parametrize("n", [2, 32])
def test_a_chain_of_products_in_a_graph_is_the_chain(gpu, n):
    """Each waits for the one before it, however early it began."""
    matrices = products([(1024, 1024)] * 6, n, BF16, gpu)
    source = torch.randn(n, 1024, device=gpu).to(BF16)

    def chain(x, after_each):
        for product in matrices:
            (x,) = few_rows([product._replace(x=x, activation="tanh", factor=None)], impl="cuda")
            after_each()
        return x

    chain(source, torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(source, lambda: None)
    for seed in range(20):
        source.copy_(torch.randn(n, 1024, generator=torch.Generator().manual_seed(seed)))
        want = chain(source, torch.cuda.synchronize)
        graph.replay()
        assert torch.equal(got, want)
