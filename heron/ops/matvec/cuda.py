"""The kernel of matvec (csrc/matvec.cu), built at first use."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from heron.ops import _build, _choice
from heron.ops.matvec.reference import ACTIVATIONS, Product

SOURCE = Path(__file__).parent / "csrc" / "matvec.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 8  # products of a launch
_LONGEST_BYTES = 48 * 1024  # of a vector, which a block keeps in shared memory
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def matvec_cuda(products: Sequence[Product]) -> list[Tensor]:
    """See :func:`heron.ops.matvec`; KernelError as :meth:`FORM.require`."""
    weights = [product.weight for product in products]
    FORM.require(weights[0].device, weights[0].dtype, weights)
    ys = []
    for begin in range(0, len(products), _MOST):
        xs, weights, activations, factors, adds = zip(*products[begin : begin + _MOST], strict=True)
        numbers = [_NUMBERS[name] for name in activations]
        ys += torch.ops.heron.matvec([_aligned(x) for x in xs], weights, numbers, factors, adds)
    return ys


def why_not(device: torch.device, dtype: torch.dtype, weights: Sequence[Tensor]) -> str | None:
    """Why the kernel can't read one of the `weights`, as a clause; None where it can read all."""
    if against := _choice.why_not_dtype(dtype, DTYPES):
        return against
    longest = _LONGEST_BYTES // dtype.itemsize
    for weight in weights:
        n_in = weight.shape[1]
        if n_in % 8 or not 0 < n_in <= longest:
            return f"it takes vectors of a multiple of 8, up to {longest} of {dtype}, not of {n_in}"
        if weight.data_ptr() % 16 or weight.stride(0) * dtype.itemsize % 16:
            return "it reads rows of a weight that begin at multiples of 16 bytes"
    return None


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "matvec", "matvec", [SOURCE], [_build.EARLY])


FORM = _choice.NativeForm("matvec", "cuda", "products with one vector", why_not, library)


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()
