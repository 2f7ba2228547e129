"""The definition of matvec: a product and a sum, which a compiler makes one kernel that reads a matrix once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Product(NamedTuple):
    """``y = add + factor * activation(weight x)``; all tensors of one dtype on one device."""

    x: Tensor
    """(1, in)."""
    weight: Tensor
    """(out, in), the last stride 1."""
    activation: str = "none"
    """A key of ACTIVATIONS."""
    factor: Tensor | None = None
    """(1, out); None: 1."""
    add: Tensor | None = None
    """(1, out); None: 0."""


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "squared relu": lambda x: torch.relu(x).square(),
}


def matvec_reference(products: Sequence[Product]) -> list[Tensor]:
    """The definition; see :func:`heron.ops.matvec`."""
    return [_product(*product) for product in products]


def _product(x: Tensor, weight: Tensor, activation: str, factor: Tensor | None, add: Tensor | None) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = ACTIVATIONS[activation]((weight.to(dtype) * x.to(dtype)).sum(dim=-1).unsqueeze(0))
    if factor is not None:
        y = y * factor.to(dtype)
    if add is not None:
        y = y + add.to(dtype)
    return y.to(x.dtype)
