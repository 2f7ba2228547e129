"""The definition of the op, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_relu_mlp_reference(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """See :func:`heron.ops.squared_relu_mlp`."""
    return F.linear(torch.relu(F.linear(x, key)).square(), value)
