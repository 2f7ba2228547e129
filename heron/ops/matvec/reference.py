"""The definition of matvec: a product and a sum, which a compiler makes one kernel that reads a matrix once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heron.ops._products import Product
from heron.ops.codes import dense


def matvec_reference(products: Sequence[Product]) -> list[Tensor]:
    """The definition; see :func:`heron.ops.matvec`."""
    return [_product(product) for product in products]


def _product(product: Product) -> Tensor:
    dtype = torch.promote_types(product.x.dtype, torch.float32)
    return product.finished((dense(product.weight, dtype) * product.x.to(dtype)).sum(dim=-1).unsqueeze(0))
