"""The definition of norm_mix, in PyTorch on any device, in at least fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_mix_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, last: Tensor, new_last: Tensor
) -> Tensor:
    """The definition; see :func:`heron.ops.norm_mix`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rounded = F.layer_norm(x, x.shape[1:], weight, bias, eps)  # computed in fp32 at least
    now, before = rounded.to(dtype), last.to(dtype)
    mixed = torch.addcmul(now, before - now, mixes.to(dtype).unsqueeze(1)).to(x.dtype)
    new_last.copy_(rounded)
    return mixed
