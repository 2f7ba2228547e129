"""The kernels of few_rows, built at first use: csrc/few_rows.cu, and for compute capability 9.0 csrc/boxes.cu."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from heron.ops import _build, _choice, _products
from heron.ops._products import Product

_CSRC = Path(__file__).parent / "csrc"
SOURCE, BOXES, SHARING = _CSRC / "few_rows.cu", _CSRC / "boxes.cu", _CSRC / "sharing.cuh"
HEADERS = [
    _build.BARRIERS, _build.BOXES, _build.CLUSTER, _build.EARLY, _build.PRODUCTS, _build.SHARED_ADDRESS, SHARING
]  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16)
MOST = 32  # vectors
FEWEST_BY_BOXES = 17  # fewer are faster by registers
PART = 1024  # numbers of a row for a block, where there are so many blocks
MOST_PARTS = 4  # blocks that share rows; 1, 2, 4 or 8
_MOST_PRODUCTS = 8  # of a launch


def few_rows_cuda(products: Sequence[Product]) -> list[Tensor]:
    """See :func:`heron.ops.few_rows`; KernelError as :meth:`FORM.require`."""
    weights = [product.weight for product in products]
    device, n = weights[0].device, len(products[0].x)
    FORM.require(device, weights[0].dtype, weights, n)
    if n >= FEWEST_BY_BOXES and torch.cuda.get_device_capability(device)[0] == 9:
        return by_boxes(products)
    return by_registers(products)


def by_registers(products: Sequence[Product], part: int = PART, most: int = MOST_PARTS) -> list[Tensor]:
    """The same by csrc/few_rows.cu."""
    launch = functools.partial(torch.ops.heron.few_rows, part=part, most=most)
    return _products.launches(products, _MOST_PRODUCTS, launch)


def by_boxes(products: Sequence[Product]) -> list[Tensor]:
    """The same by csrc/boxes.cu, on compute capability 9.0."""
    return _products.launches(products, _MOST_PRODUCTS, torch.ops.heron.few_rows_by_boxes)


def why_not(device: torch.device, dtype: torch.dtype, weights: Sequence[Tensor], n: int) -> str | None:
    """Why the kernel does not run for n vectors and `weights`, as a clause; None where it does."""
    if against := _choice.why_not_dtype(dtype, DTYPES):
        return against
    if not 1 <= n <= MOST:
        return f"it takes 1 to {MOST} vectors, not {n}"
    for weight in weights:
        if (n_in := weight.shape[1]) % 8:
            return f"it takes vectors of a multiple of 8, not of {n_in}"
    return _products.why_not_rows(weights)


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernels for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "few_rows", "few_rows", [SOURCE], HEADERS)
    if capability[0] == 9:
        _build.load_kernels_for(capability, "few_rows", "few_rows_boxes", [BOXES], HEADERS)


FORM = _choice.NativeForm("few_rows", "cuda", "products with few vectors", why_not, library)
