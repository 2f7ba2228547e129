"""heron.ops.few_rows by the copy engine and warpgroups (csrc/boxes.cu): on a CPU by its source, on a GPU by fp64."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from heron.ops import _build, few_rows
from heron.ops._products import ACTIVATIONS
from heron.ops.few_rows import cuda
from heron.ops.few_rows.cuda import by_boxes
from tests.ops.kernels import BFLOAT16, HALF, check_that_none_spills, needs_nvcc
from tests.ops.products import (
    by_source,
    check_that_vectors_keep_their_bits,
    check_that_what_is_not_finite_stays_so,
    compare,
    exact,
    of_vectors,
    products,
)

EMULATOR = Path(__file__).parent / "emulator"
BF16, FP16 = torch.bfloat16, torch.float16
SHARING = (256, 16)  # part and enough of Sharing, for small matrices
SMALL = [(3, 8), (65, 776), (70, 40), (9, 136), (133, 520)]
needs_compiler = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def library():
    """The kernel's source, compiled for a CPU."""
    depends = [cuda.BOXES, cuda.SHARING, _build.PRODUCTS, EMULATOR / "hardware.h", EMULATOR / "single_token.h"]
    flags = ("-O2", "-U_FORTIFY_SOURCE")
    library = _build.load_c_library("few_rows_boxes_emulated", [EMULATOR / "few_rows_boxes.cpp"], flags, depends)
    library.few_rows_boxes_emulated.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def emulated(library):
    """few_rows, computed by the kernel's source on a CPU."""

    def multiply(some, *sharing):
        return by_source(library.few_rows_boxes_emulated, some, len(some), len(some[0].x), *(sharing or SHARING))

    return multiply


@needs_compiler
@pytest.mark.parametrize("n", [2, 9, 32])
def test_boxes_multiply_on_a_cpu(emulated, n):
    some = products(SMALL, n, BF16, seed=n)
    together = emulated(some)
    compare(together, some)
    for y, product in zip(together, some, strict=True):
        assert torch.equal(emulated([product])[0], y)


@needs_compiler
@pytest.mark.parametrize(("n", "sharing"), [(5, (64, 128)), (20, (8192, 1)), (32, (512, 1))])
def test_every_way_to_share_boxes_out_multiplies(emulated, n, sharing):
    some = products([(40, 1416), (300, 264), (67, 120)], n, BF16, seed=n)
    compare(emulated(some, *sharing), some)


@needs_compiler
@pytest.mark.parametrize(
    ("n_out", "n_in", "parts"),
    [(2048, 2048, 4), (8192, 2048, 2), (2048, 8192, 8), (65536, 2048, 1), (96, 2048, 8), (2048, 96, 1), (2048, 256, 2)],
)
def test_rows_are_divided_into_boxes_as_the_documents_say(library, n_out, n_in, parts):
    assert library.few_rows_boxes_parts(n_out, n_in) == parts


@needs_compiler
def test_what_a_vector_gives_by_boxes_is_the_same_bits_whatever_is_beside_it(emulated):
    check_that_vectors_keep_their_bits(emulated, SMALL)


@needs_compiler
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_stays_so_by_boxes(emulated, activation):
    check_that_what_is_not_finite_stays_so(emulated, few_rows, activation)


def test_boxes_are_built_for_compute_capability_9(monkeypatch):
    built = []
    monkeypatch.setattr(_build, "load_kernels_for", lambda capability, op, name, *_: built.append((name, capability)))
    for capability in ((8, 6), (9, 0), (12, 0)):
        cuda.library.__wrapped__(capability)
    assert [of for name, of in built if name == "few_rows"] == [(8, 6), (9, 0), (12, 0)]
    assert [of for name, of in built if name == "few_rows_boxes"] == [(9, 0)]


@needs_nvcc
def test_boxes_compile_without_spilling(tmp_path):
    forms = [f"few_rows_by_boxes<{t}>(const __grid_constant__ Products)" for t in (BFLOAT16, HALF)]
    headers = ["type_traits", "cuda.h", *cuda.HEADERS]
    check_that_none_spills(tmp_path, cuda.BOXES, forms, "90a", headers, before="using Half = __half;")


# On a GPU


@pytest.fixture
def hopper():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no CUDA device of compute capability 9.0")
    cuda.library((9, 0))
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2, 9, 17, 32])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_boxes_multiply(hopper, n, dtype):
    shapes = [(96, 2048), (1, 8), (2048, 2048), (77, 768), (2048, 96), (65, 8192), (640, 8192), (3000, 264), (5, 20000)]
    some = products(shapes, n, dtype, hopper, seed=n)  # more than one launch
    together = by_boxes(some)
    compare(together, some)
    for y, product in zip(together, some, strict=True):
        assert torch.equal(by_boxes([product])[0], y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_vector_gives_the_same_bits_by_boxes_whatever_is_beside_it(hopper, dtype):
    some = products([(2048, 2048), (96, 2048), (640, 8192), (513, 264)], 32, dtype, hopper)
    for product in some:
        product.x[20] = torch.nan
    together = by_boxes(some)
    for chosen in ([3], [31, 3], [*range(9)], [*range(18)]):  # not the one that is no number
        for alone, beside in zip(by_boxes(of_vectors(some, chosen)), together, strict=True):
            assert torch.equal(alone, beside[chosen])


@pytest.mark.gpu
def test_boxes_are_at_most_twice_as_far_from_fp64_as_pytorchs(hopper):
    some = [p._replace(activation="none", factor=None, add=None) for p in products([(2048, 8192)], 32, BF16, hopper)]
    (x, weight, *_), (want, _) = some[0], exact(some[0])
    mine, theirs = ((y.double() - want).norm() for y in (by_boxes(some)[0], x @ weight.T))
    assert mine <= 2 * theirs
