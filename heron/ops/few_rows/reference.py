"""The definition of few_rows: a matrix product and what follows it, in at least fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from heron.ops._products import Product


def few_rows_reference(products: Sequence[Product]) -> list[Tensor]:
    """The definition; see :func:`heron.ops.few_rows`."""
    return [_product(product) for product in products]


def _product(product: Product) -> Tensor:
    dtype = torch.promote_types(product.x.dtype, torch.float32)
    return product.finished(F.linear(product.x.to(dtype), product.weight.to(dtype)))
