"""The definition of norm_mix, in PyTorch on any device, in at least fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_mix_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, last: Tensor) -> Tensor:
    """The definition; see :func:`heron.ops.norm_mix`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    now = F.layer_norm(x.to(dtype), x.shape[1:], weight.to(dtype), bias.to(dtype), eps).to(x.dtype)
    mixed = torch.addcmul(now.to(dtype), last.to(dtype) - now.to(dtype), mixes.to(dtype).unsqueeze(1)).to(x.dtype)
    last.copy_(now)
    return mixed
