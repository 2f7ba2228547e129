"""The kernels (csrc/squared_relu_product.cu), built at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _build, _choice

SOURCE = Path(__file__).parent / "csrc" / "squared_relu_product.cu"
HEADERS = [_build.BARRIERS, _build.BOXES, _build.CLUSTER, _build.EARLY, _build.SHARED_ADDRESS]
FORMS = 2  # of tiles
FEWEST = 3e10  # operations of a product; what takes less is not worth a choice
_MULTIPLE = 8  # numbers in 16 bytes


def by_boxes(x: Tensor, weight: Tensor, square: Tensor | None, form: int) -> Tensor:
    """:func:`heron.ops.squared_relu_product.squared_relu_product`, or with `square` its gradient, by tiles of one of
    FORMS forms. All give the same bits.

    Raises:
        KernelError: matrices that do not fit one another, that are not of bf16, or whose rows are not a multiple of 8
            numbers apart; another device; or as :func:`library`.
    """
    check(x, weight, square)
    capability = torch.cuda.get_device_capability(x.device)
    if capability[0] != 9:
        raise KernelError(
            f"squared_relu_product: the kernels are for compute capability 9.0, this device has {capability}"
        )
    library(capability)  # a compiler may have kept a graph, and not looked for it
    return torch.ops.heron.squared_relu_product_by_boxes(x, weight, square, form)


def check(x: Tensor, weight: Tensor, square: Tensor | None) -> None:
    """KernelError, unless the kernels read these matrices as they lie."""
    inner = 1 if square is None else 0
    fits = x.shape[1] == weight.shape[inner]
    if square is not None:
        fits = fits and square.shape == (x.shape[0], weight.shape[1])
    for matrix in (x, weight) if square is None else (x, weight, square):
        step, within = matrix.stride()
        fits = fits and within == 1 and step % _MULTIPLE == 0 and step >= matrix.shape[1]
        fits = fits and matrix.dtype == torch.bfloat16 and matrix.device == x.device
    if not fits:
        given = ", ".join(
            f"{name} {tuple(matrix.shape)} {matrix.dtype} on {matrix.device}, strides {matrix.stride()}"
            for name, matrix in (("x", x), ("weight", weight), ("square", square))
            if matrix is not None
        )
        wanted = (
            "x (n, in), weight (hidden, in)" if square is None else "x (n, in), weight (in, hidden), square (n, hidden)"
        )
        raise KernelError(
            f"squared_relu_product: wanted {wanted}, of {torch.bfloat16} on one device, rows a multiple of {_MULTIPLE} "
            f"numbers apart; got {given}"
        )


def why_not(device: torch.device, x: Tensor, weight: Tensor) -> str | None:
    """Why the kernels do not run for x (n, in) and weight (hidden, in), as a clause; None where they do."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "it is for compute capability 9.0"
    if against := _choice.why_not_dtype(x.dtype, (torch.bfloat16,)):
        return against
    (n, n_in), hidden = x.shape, weight.shape[0]
    if 2 * n * n_in * hidden < FEWEST:
        return f"it is for products of {FEWEST:.0e} operations and more"
    if n_in % _MULTIPLE or hidden % _MULTIPLE:
        return f"it takes multiples of {_MULTIPLE} channels, not {n_in} and {hidden}"
    return None


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernels for devices of this compute capability; KernelError where that fails.

    For others than 9.0 there is nothing to build.
    """
    if capability[0] == 9:
        _build.load_kernels_for(capability, "squared_relu_product", "squared_relu_product", [SOURCE], HEADERS)


FORM = _choice.NativeForm("squared_relu_product", "cuda", "the products of a channel mix", why_not, library)
