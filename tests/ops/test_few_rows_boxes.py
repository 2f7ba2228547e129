"""heron.ops.few_rows by the copy engine and warpgroups (csrc/boxes.cu): on a CPU by its source, on a GPU by fp64."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from heron.ops import _build, few_rows
from heron.ops._products import ACTIVATIONS
from heron.ops.few_rows import Product, cuda
from tests.ops.kernels import BFLOAT16, HALF, check_that_none_spills, needs_nvcc
from tests.ops.products import compare, exact, of_vectors, products

EMULATOR = Path(__file__).parent / "emulator"
BF16, FP16 = torch.bfloat16, torch.float16
SHARING = (256, 4, 16, 2)  # part, most, enough and side_by_side of plan, for small matrices
SMALL = [(3, 8), (65, 776), (70, 40), (9, 136), (133, 520)]
needs_compiler = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def emulated():
    """few_rows, computed by the kernel's source on a CPU."""
    depends = [cuda.BOXES, _build.PRODUCTS, EMULATOR / "hardware.h", EMULATOR / "single_token.h"]
    flags = ("-O2", "-U_FORTIFY_SOURCE")
    library = _build.load_c_library("few_rows_boxes_emulated", [EMULATOR / "few_rows_boxes.cpp"], flags, depends)
    library.few_rows_boxes_emulated.restype = ctypes.c_char_p

    def multiply(some, *sharing):
        xs, weights, activations, factors, adds = zip(*some, strict=True)
        n = len(xs[0])
        ys = [torch.full((n, len(weight)), torch.nan, dtype=weight.dtype) for weight in weights]

        def pointers(tensors):
            return (ctypes.c_void_p * len(some))(*(None if x is None else x.data_ptr() for x in tensors))

        def integers(values, kind=ctypes.c_int):
            return (kind * len(some))(*values)

        error = library.few_rows_boxes_emulated(
            len(some), n, *(sharing or SHARING), *map(pointers, (xs, weights, factors, adds, ys)),
            integers([weight.stride(0) for weight in weights], ctypes.c_int64),
            integers([weight.shape[1] for weight in weights]), integers(map(len, weights)),
            integers([list(ACTIVATIONS).index(name) for name in activations]),
        )  # fmt: skip
        assert error is None, error.decode()
        return ys

    return multiply


@needs_compiler
@pytest.mark.parametrize("n", [2, 33, 65, 130])
def test_boxes_multiply_on_a_cpu(emulated, n):
    some = products(SMALL, n, BF16, seed=n)
    together = emulated(some)
    compare(together, some)
    for y, product in zip(together, some, strict=True):
        assert torch.equal(emulated([product])[0], y)


@needs_compiler
@pytest.mark.parametrize(
    ("n", "sharing"),
    [(5, (64, 8, 128, 1)), (20, (8192, 1, 1, 4)), (40, (512, 2, 1, 8)), (130, (64, 8, 128, 8)), (140, (8192, 1, 1, 4))],
)
def test_every_way_to_share_boxes_out_multiplies(emulated, n, sharing):
    some = products([(40, 1416), (300, 264), (67, 120)], n, BF16, seed=n)
    compare(emulated(some, *sharing), some)


@needs_compiler
def test_what_a_vector_gives_by_boxes_is_the_same_bits_whatever_is_beside_it(emulated):
    some = products(SMALL, 40, BF16)
    for product in some:  # and it may be anything
        product.x[20] = torch.inf
        product.x[21] = torch.nan
    together = emulated(some)
    for chosen in ([3], [31, 3, 1], [*range(17)]):
        for alone, beside in zip(emulated(of_vectors(some, chosen)), together, strict=True):
            assert torch.equal(alone, beside[chosen])


@needs_compiler
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_stays_so_by_boxes(emulated, activation):
    weight = torch.zeros(3, 8, dtype=BF16)
    weight[1, 7], weight[2, 0] = torch.nan, torch.inf
    some = [Product(torch.ones(2, 8, dtype=BF16), weight, activation)]
    (got,), (want,) = emulated(some), few_rows(some)
    assert torch.equal(got.nan_to_num(nan=-7.0), want.nan_to_num(nan=-7.0))


@pytest.mark.parametrize(
    ("capability", "most"), [((8, 6), cuda.MOST), ((9, 0), cuda.MOST_BY_BOXES), ((12, 0), cuda.MOST)]
)
def test_devices_with_boxes_take_more_vectors(monkeypatch, capability, most):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    weights, device = [torch.zeros(4, 8, dtype=BF16)], torch.device("cuda")
    assert cuda.why_not(device, BF16, weights, most) is None
    assert cuda.why_not(device, BF16, weights, most + 1) == f"it takes 1 to {most} vectors, not {most + 1}"
    built = []
    monkeypatch.setattr(_build, "load_kernels_for", lambda capability, op, name, *_: built.append(name))
    cuda.library.__wrapped__(capability)
    assert built == ["few_rows", *["few_rows_boxes"] * (most > cuda.MOST)]


@needs_nvcc
def test_boxes_compile_without_spilling(tmp_path):
    forms = [
        f"few_rows_by_boxes<{t}, {columns}>(const __grid_constant__ Products)"
        for t in (BFLOAT16, HALF)
        for columns in (32, 64, 128)
    ]
    headers = ["algorithm", "type_traits", "cuda.h", _build.EARLY, _build.PRODUCTS]
    check_that_none_spills(tmp_path, cuda.BOXES, forms, "90a", headers, before="using Half = __half;")


# On a GPU


@pytest.fixture
def hopper():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no CUDA device of compute capability 9.0")
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("n", [17, 32, 33, 64, 65, 128, 129, 200, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_boxes_multiply(hopper, n, dtype):
    shapes = [(96, 2048), (1, 8), (2048, 2048), (77, 768), (2048, 96), (65, 8192), (640, 8192), (3000, 264), (5, 20000)]
    some = products(shapes, n, dtype, hopper, seed=n)  # more than one launch
    together = few_rows(some, impl="cuda")
    compare(together, some)
    for y, product in zip(together, some, strict=True):
        assert torch.equal(few_rows([product], impl="cuda")[0], y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_vector_gives_the_same_bits_by_boxes_whatever_is_beside_it(hopper, dtype):
    some = products([(2048, 2048), (96, 2048), (640, 8192), (513, 264)], 128, dtype, hopper)
    for product in some:
        product.x[20] = torch.nan
    together = few_rows(some, impl="cuda")
    for chosen in ([*range(19)], [*range(50)], [*range(22, 125)]):  # not the one that is no number
        for alone, beside in zip(few_rows(of_vectors(some, chosen), impl="cuda"), together, strict=True):
            assert torch.equal(alone, beside[chosen])


@pytest.mark.gpu
def test_boxes_are_at_most_twice_as_far_from_fp64_as_pytorchs(hopper):
    some = [p._replace(activation="none", factor=None, add=None) for p in products([(2048, 8192)], 256, BF16, hopper)]
    (x, weight, *_), (want, _) = some[0], exact(some[0])
    mine, theirs = ((y.double() - want).norm() for y in (few_rows(some, impl="cuda")[0], x @ weight.T))
    assert mine <= 2 * theirs


@pytest.mark.gpu
@pytest.mark.parametrize("n", [32, 256])
def test_a_chain_of_boxes_in_a_graph_is_the_chain(hopper, n):
    """Each waits for the one before it, however early it began."""
    matrices = products([(1024, 1024)] * 6, n, BF16, hopper)
    source = torch.randn(n, 1024, device=hopper).to(BF16)

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
