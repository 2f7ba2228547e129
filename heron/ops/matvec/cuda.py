"""The kernel of matvec (csrc/matvec.cu), built at first use."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from heron.ops import _build, _choice, _products
from heron.ops._products import Product
from heron.ops.codes import CodedMatrix

SOURCE = Path(__file__).parent / "csrc" / "matvec.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 8  # products of a launch
_LONGEST_BYTES = 48 * 1024  # of a vector, which a block keeps in shared memory


def matvec_cuda(products: Sequence[Product]) -> list[Tensor]:
    """See :func:`heron.ops.matvec`; KernelError as :meth:`FORM.require`."""
    x = products[0].x
    FORM.require(x.device, x.dtype, [product.weight for product in products])
    return _products.launches(products, _MOST, _launch)


def _launch(xs: Sequence[Tensor], weights: Sequence[Tensor | CodedMatrix], *rest: Sequence) -> list[Tensor]:
    coded = [weight if isinstance(weight, CodedMatrix) else None for weight in weights]
    scales, levels = ([weight and getattr(weight, name) for weight in coded] for name in ("scales", "levels"))
    return torch.ops.heron.matvec(xs, list(map(_numbers, weights)), scales, levels, *rest)


def _numbers(weight: Tensor | CodedMatrix) -> Tensor:
    """What the kernel reads row by row."""
    return weight.codes if isinstance(weight, CodedMatrix) else weight


def why_not(device: torch.device, dtype: torch.dtype, weights: Sequence[Tensor | CodedMatrix]) -> str | None:
    """Why the kernel can't read one of the `weights`, as a clause; None where it can read all."""
    if against := _choice.why_not_dtype(dtype, DTYPES):
        return against
    longest = _LONGEST_BYTES // dtype.itemsize
    for weight in weights:
        if isinstance(weight, CodedMatrix) and weight.levels is not None and weight.levels.data_ptr() % 16:
            return "it reads levels that begin at a multiple of 16 bytes"
        n_in = weight.shape[1]
        if n_in % 8 or not 0 < n_in <= longest:
            return f"it takes vectors of a multiple of 8, up to {longest} of {dtype}, not of {n_in}"
    return _products.why_not_rows(list(map(_numbers, weights)))


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "matvec", "matvec", [SOURCE], [_build.EARLY, _build.PRODUCTS])


FORM = _choice.NativeForm("matvec", "cuda", "products with one vector", why_not, library)
