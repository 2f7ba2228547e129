"""The definition, in plain PyTorch, in the dtype of what it is given."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_relu_product_reference(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`heron.ops.squared_relu_product.squared_relu_product`."""
    return torch.relu(x @ weight.T).square()


def squared_relu_product_gradient_reference(d_out: Tensor, weight: Tensor, square: Tensor) -> Tensor:
    """See :func:`heron.ops.squared_relu_product.squared_relu_product_gradient`."""
    return torch.where(square <= 0, 0, (d_out @ weight) * (2 * square.sqrt()))
