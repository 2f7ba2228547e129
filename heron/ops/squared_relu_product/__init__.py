"""The products of a channel mix together with its squared ReLU, forward and backward. README.md says why."""

from __future__ import annotations

import torch
from torch import Tensor

from heron.ops import _choice
from heron.ops.squared_relu_product import chosen, cuda
from heron.ops.squared_relu_product.reference import (
    squared_relu_product_gradient_reference,
    squared_relu_product_reference,
)

__all__ = [
    "squared_relu_product",
    "squared_relu_product_choice",
    "squared_relu_product_gradient",
    "squared_relu_product_gradient_reference",
    "squared_relu_product_reference",
]
_IN_PYTORCH = _choice.Choice("reference", "products and elementwise operations one by one")

_library = torch.library.Library("heron", "FRAGMENT")
_library.define("squared_relu_product(Tensor x, Tensor weight) -> Tensor")
_library.define("squared_relu_product_gradient(Tensor d_out, Tensor weight, Tensor square) -> Tensor")


def squared_relu_product(x: Tensor, weight: Tensor) -> Tensor:
    """``square = relu(key)^2`` with ``key = x weight^T``, in one kernel on a GPU. There is no gradient: see below.

    Args:
        x: (n, in); on a GPU bf16, which :func:`squared_relu_product_choice` takes.
        weight: (hidden, in), of that dtype.

    Returns:
        (n, hidden), bit for bit what PyTorch gives for these operations one by one.

    Raises:
        KernelError: on a GPU, matrices that the kernels do not read, or a device other than of compute capability 9.0.
    """
    return torch.ops.heron.squared_relu_product(x, weight)


def squared_relu_product_gradient(d_out: Tensor, weight: Tensor, square: Tensor) -> Tensor:
    """The gradient of the key of :func:`squared_relu_product` where ``out = square weight^T`` is what is made of it::

        d_key = 2 relu(key) (d_out weight)

    Args:
        d_out: (n, out), dtype and device as there.
        weight: (out, hidden).
        square: (n, hidden), of which relu(key) is the root.

    Returns:
        (n, hidden); in bf16 bit for bit what PyTorch gives, which keeps the key, for keys up to 0 and from 1.1e-19 to
        1.8e19. The square of a smaller one is no normal number, and d_key is off by up to 2.2e-19 of d_out weight.

    Raises:
        KernelError: as there.
    """
    return torch.ops.heron.squared_relu_product_gradient(d_out, weight, square)


def squared_relu_product_choice(x: Tensor, weight: Tensor) -> _choice.Choice:
    """How a channel mix of x (n, in) and a key's weight (hidden, in) is computed faster: "cuda", by these operators, or
    "reference", without them. Only sizes, dtype and device are looked at.

    At the first call of sizes that the kernels take, both ways are measured.
    """
    choice = cuda.FORM.choice("in one kernel each", _IN_PYTORCH, x.device, x, weight)
    if choice.impl != "cuda":
        return choice
    if (against := cuda.FORM.why_not_built(x.device)) is not None:  # for a compiler it counted as there
        return _choice.Choice("reference", f"{_IN_PYTORCH.reason}; not in CUDA ({against})")
    if not _measured(x, weight.shape[0]).is_faster:
        return _choice.Choice("reference", f"{_IN_PYTORCH.reason}, which take less time")
    return choice


def _measured(x: Tensor, hidden: int) -> chosen.Measured:
    n, n_in = x.shape
    return chosen.measured(x.device, n, n_in, hidden)


@torch.library.impl(_library, "squared_relu_product", "CUDA")
def _on_cuda(x: Tensor, weight: Tensor) -> Tensor:
    return cuda.by_boxes(x, weight, None, _measured(x, weight.shape[0]).forward)


@torch.library.impl(_library, "squared_relu_product_gradient", "CUDA")
def _gradient_on_cuda(d_out: Tensor, weight: Tensor, square: Tensor) -> Tensor:
    return cuda.by_boxes(d_out, weight, square, _measured(d_out, weight.shape[1]).backward)


_library.impl("squared_relu_product", squared_relu_product_reference, "CPU")
_library.impl("squared_relu_product_gradient", squared_relu_product_gradient_reference, "CPU")


@torch.library.register_fake("heron::squared_relu_product", lib=_library)
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("heron::squared_relu_product_gradient", lib=_library)
def _(d_out, weight, square):
    return d_out.new_empty(d_out.shape[0], weight.shape[1])
