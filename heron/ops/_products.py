"""Products of matrices with one or more vectors each, as several ops take and check them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops.codes import GROUP, CodedMatrix, Matrix


class Product(NamedTuple, Generic[Matrix]):
    """``y = add + factor * activation(weight x)`` for n vectors x; all on one device, all but weights of codes of one
    dtype."""

    x: Tensor
    """(n, in)."""
    weight: Matrix
    """(out, in), the last stride 1. Of codes it is read by matvec alone."""
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


def check(op: str, products: Sequence[Product], n: int, of_codes: bool = False) -> None:
    """KernelError, in the name of `op`, unless all `products` are as they say, of n vectors, and of one dtype.

    Args:
        of_codes: whether `op` takes such weights.
    """
    for number, product in enumerate(products):
        if isinstance(product.weight, CodedMatrix) and not of_codes:
            raise KernelError(f"{op}: product {number}: weight must be floating, got one of codes; dequantize it")
        _check(f"{op}: product {number}:", product, products[0].x, n)


def _check(where: str, product: Product, first: Tensor, n: int) -> None:
    weight = product.weight
    if isinstance(weight, CodedMatrix):
        _check_codes(where, weight, first.device)
    elif weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape or weight.stride(1) != 1:
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
        if tensor is None or isinstance(tensor, CodedMatrix):
            continue
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise KernelError(
                f"{where} all tensors must be {first.dtype} on {first.device}; "
                f"{name} is {tensor.dtype} on {tensor.device}"
            )
        if size is not None and (tuple(tensor.shape) != (n, size) or not tensor.is_contiguous()):
            raise KernelError(f"{where} {name} must be ({n}, {size}) and contiguous, got {tuple(tensor.shape)}")


def _check_codes(where: str, weight: CodedMatrix, device: torch.device) -> None:
    codes, scales, levels = weight
    per_group, dtype, wanted = (GROUP, torch.int8, "in") if levels is None else (GROUP // 4, torch.int16, "in / 4")
    n_out, width = codes.shape
    fits = 0 not in codes.shape and width % per_group == 0 and tuple(scales.shape) == (n_out, width // per_group)
    dtypes = codes.dtype, scales.dtype
    if not fits or dtypes != (dtype, torch.bfloat16) or not codes.is_contiguous() or not scales.is_contiguous():
        raise KernelError(
            f"{where} weight in {weight.bits} bits must be (out, {wanted}) {dtype} and (out, in / {GROUP}) "
            f"torch.bfloat16, contiguous, not empty; got {tuple(codes.shape)} {codes.dtype} and "
            f"{tuple(scales.shape)} {scales.dtype}"
        )
    if levels is not None and (tuple(levels.shape), levels.dtype, levels.is_contiguous()) != ((16,), torch.int8, True):
        raise KernelError(
            f"{where} levels must be (16,) torch.int8, contiguous; got {tuple(levels.shape)} {levels.dtype}"
        )
    if devices := {part.device for part in weight if part is not None} - {device}:
        raise KernelError(f"{where} all tensors must be on {device}; weight is on {', '.join(map(str, devices))}")


def why_not_rows(weights: Sequence[Tensor]) -> str | None:
    """Why a kernel that reads pieces of 16 bytes can't read the rows of `weights`, as a clause; None where it can."""
    for weight in weights:
        if weight.data_ptr() % 16 or weight.stride(0) * weight.itemsize % 16:
            return "it reads rows of a weight that begin at multiples of 16 bytes"
    return None


def launches(products: Sequence[Product], most: int, launch: Callable[..., list[Tensor]]) -> list[Tensor]:
    """What `launch` gives for up to `most` products at a time: of their x, weights, numbers of activations, factors and
    adds. All but weights begin at multiples of 16 bytes."""
    ys = []
    for begin in range(0, len(products), most):
        xs, weights, activations, factors, adds = zip(*products[begin : begin + most], strict=True)
        xs, factors, adds = (list(map(_aligned, each)) for each in (xs, factors, adds))
        ys += launch(xs, weights, [_NUMBERS[name] for name in activations], factors, adds)
    return ys


def _aligned(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.data_ptr() % 16 == 0 else x.clone()
