"""The definition, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def low_rank_linear_reference(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """See :func:`heron.ops.low_rank_linear`."""
    return F.linear(x, weight) + scale * F.linear(F.linear(x, down), up)
