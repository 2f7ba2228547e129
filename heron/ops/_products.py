"""Products of matrices with one or more vectors each, as several ops take and check them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from heron.errors import KernelError


class Product(NamedTuple):
    """``y = add + factor * activation(weight x)`` for n vectors x; all tensors of one dtype on one device."""

    x: Tensor
    """(n, in)."""
    weight: Tensor
    """(out, in), the last stride 1."""
    activation: str = "none"
    """A key of ACTIVATIONS."""
    factor: Tensor | None = None
    """(n, out); None: 1."""
    add: Tensor | None = None
    """(n, out); None: 0."""

    def finished(self, y: Tensor) -> Tensor:
        """The product from what `weight` makes of x, (n, out), in whose dtype it is computed; in the dtype of x."""
        y = ACTIVATIONS[self.activation](y)
        if self.factor is not None:
            y = y * self.factor.to(y.dtype)
        if self.add is not None:
            y = y + self.add.to(y.dtype)
        return y.to(self.x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "squared relu": lambda x: torch.relu(x).square(),
}
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def check(op: str, products: Sequence[Product], n: int) -> None:
    """KernelError, in the name of `op`, unless all `products` are as they say, of n vectors, and of one dtype."""
    for number, product in enumerate(products):
        _check(f"{op}: product {number}:", product, products[0].weight, n)


def _check(where: str, product: Product, first: Tensor, n: int) -> None:
    weight = product.weight
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape or weight.stride(1) != 1:
        raise KernelError(
            f"{where} weight must be (out, in), floating, not empty, its last stride 1; "
            f"got {tuple(weight.shape)} {weight.dtype}, strides {weight.stride()}"
        )
    if product.activation not in ACTIVATIONS:
        raise KernelError(f"{where} activation must be {', '.join(ACTIVATIONS)}; got {product.activation!r}")
    n_out, n_in = weight.shape
    wanted = {"x": n_in, "weight": None, "factor": n_out, "add": n_out}
    for name, size in wanted.items():
        tensor = getattr(product, name)
        if tensor is None:
            continue
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise KernelError(
                f"{where} all tensors must be {first.dtype} on {first.device}; "
                f"{name} is {tensor.dtype} on {tensor.device}"
            )
        if size is not None and (tuple(tensor.shape) != (n, size) or not tensor.is_contiguous()):
            raise KernelError(f"{where} {name} must be ({n}, {size}) and contiguous, got {tuple(tensor.shape)}")


def why_not_rows(dtype: torch.dtype, weights: Sequence[Tensor]) -> str | None:
    """Why a kernel that reads pieces of 16 bytes can't read the rows of `weights`, as a clause; None where it can."""
    for weight in weights:
        if weight.data_ptr() % 16 or weight.stride(0) * dtype.itemsize % 16:
            return "it reads rows of a weight that begin at multiples of 16 bytes"
    return None


def launches(products: Sequence[Product], most: int, launch: Callable[..., list[Tensor]]) -> list[Tensor]:
    """What `launch` gives for up to `most` products at a time: of their x, on multiples of 16 bytes, weights, numbers
    of activations, factors and adds."""
    ys = []
    for begin in range(0, len(products), most):
        xs, weights, activations, factors, adds = zip(*products[begin : begin + most], strict=True)
        ys += launch([_aligned(x) for x in xs], weights, [_NUMBERS[name] for name in activations], factors, adds)
    return ys


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()
