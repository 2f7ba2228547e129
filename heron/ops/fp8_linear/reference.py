"""The definition, in plain PyTorch, in the dtype of what it is given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fp8_linear_reference(x: Tensor, weight: Tensor, y_in_bf16: bool = False) -> Tensor:
    """See :func:`heron.ops.fp8_linear`. Gradients pass through the rounding of x and weight; d_y is not rounded."""
    y = F.linear(x + (rounded(x) - x).detach(), weight + (rounded(weight) - weight).detach())
    return y + (F.linear(x, weight) - y).detach() if y_in_bf16 else y


def rounded(x: Tensor) -> Tensor:
    """The numbers nearest to x (..., m) that e4m3 has, by a power of two for each row, which fills its range."""
    largest = x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=2.0**-54)
    mantissa, exponent = torch.frexp(largest)  # of 0.5 up to 1
    exponent = exponent - 9 + (mantissa >= 0.875)  # 1.75 * 2^8 is the largest number of e4m3
    in_range = torch.ldexp(x.detach(), -exponent).float()
    return torch.ldexp(in_range.to(torch.float8_e4m3fn).to(x.dtype), exponent)
