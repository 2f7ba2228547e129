"""The kernel of matvec (csrc/matvec.cu), built at first use."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _build
from heron.ops.matvec.reference import ACTIVATIONS, Product

SOURCE = Path(__file__).parent / "csrc" / "matvec.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 8  # products of a launch
_LONGEST_BYTES = 48 * 1024  # of a vector, which a block keeps in shared memory
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def matvec_cuda(products: Sequence[Product]) -> list[Tensor]:
    """See :func:`heron.ops.matvec`.

    Raises:
        KernelError: no CUDA device, or one older than 8.0, what :func:`why_not` says, or the kernel can't be built.
    """
    for product in products:
        if product.weight.device.type != "cuda":
            raise KernelError(f'matvec: impl="cuda" needs tensors on a CUDA device, got {product.weight.device}')
        if reason := why_not(product.weight):
            raise KernelError(f'matvec: impl="cuda": {reason}; use impl="auto"')
    ys = []
    for begin in range(0, len(products), _MOST):
        xs, weights, activations, factors, adds = zip(*products[begin : begin + _MOST], strict=True)
        library(torch.cuda.get_device_capability(weights[0].device))
        numbers = [_NUMBERS[name] for name in activations]
        ys += torch.ops.heron.matvec([_aligned(x) for x in xs], weights, numbers, factors, adds)
    return ys


def why_not(weight: Tensor) -> str | None:
    """Why the kernel can't read `weight`, as a clause; None where it can."""
    n_in, n_bytes = weight.shape[1], weight.element_size()
    if weight.dtype not in DTYPES:
        return f"it takes fp32, bf16 and fp16, not {weight.dtype}"
    if n_in % 8 or n_in == 0 or n_in * n_bytes > _LONGEST_BYTES:
        return (
            f"it takes vectors of a multiple of 8, up to {_LONGEST_BYTES // n_bytes} of {weight.dtype}, not of {n_in}"
        )
    if weight.data_ptr() % 16 or weight.stride(0) * n_bytes % 16:
        return "it reads rows of a weight that begin at multiples of 16 bytes"
    return None


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError as above."""
    _build.load_kernels_for(capability, "matvec", "matvec", [SOURCE], [_build.EARLY])


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()
