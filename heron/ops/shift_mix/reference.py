"""The definition of the op, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_mix_reference(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, mixes: Sequence[Tensor], eps: float
) -> tuple[Tensor, list[Tensor]]:
    """See :func:`heron.ops.shift_mix`."""
    if branch is not None:
        x = x + branch
    normed = F.layer_norm(x, weight.shape, weight, bias, eps)
    delta = F.pad(normed, (0, 0, 1, -1)) - normed
    return x, [torch.addcmul(normed, delta, mix.to(normed.dtype)) for mix in mixes]
