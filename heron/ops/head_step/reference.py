"""The definition of head_step, in PyTorch on any device, in at least fp32."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_NORM = 1e-12


class HeadInputs(NamedTuple):
    """What the products of the time mix give for one token of n sequences, all (n, C) in one dtype."""

    r: Tensor
    w: Tensor
    """Decay logits."""
    k: Tensor
    v: Tensor
    iclr_logits: Tensor
    gate: Tensor
    value_logits: Tensor | None = None
    """Of the mix of v with v_first; None in layer 0."""
    v_first: Tensor | None = None
    """Layer 0's v."""


class HeadWeights(NamedTuple):
    """One layer's weights of single channels, all (C,) in the dtype of the inputs."""

    k_k: Tensor
    k_a: Tensor
    r_k: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    """Of the norm over a head."""


def head_step_reference(inputs: HeadInputs, weights: HeadWeights, wkv: Tensor) -> Tensor:
    """The definition; see :func:`heron.ops.head_step`."""
    n, H, N, _ = wkv.shape
    heads = (n, H, N)
    r, w, k, v, iclr_logits, gate = (x.to(wkv.dtype).view(heads) for x in inputs[:6])
    k_k, k_a, r_k, norm_weight, norm_bias = (x.to(wkv.dtype).view(H, N) for x in weights[:5])
    if inputs.v_first is not None:
        value_logits, v_first = (x.to(wkv.dtype).view(heads) for x in (inputs.value_logits, inputs.v_first))
        v = torch.lerp(v, v_first, torch.sigmoid(value_logits))
    iclr = torch.sigmoid(iclr_logits)
    removal_key = F.normalize(k * k_k, dim=-1, eps=LEAST_NORM)
    k = k * (1 + (iclr - 1) * k_a)
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w))
    removed = (wkv * removal_key.unsqueeze(2)).sum(dim=3, keepdim=True)  # (n, H, N_value, 1)
    new = wkv * decay.unsqueeze(2) - removed * (removal_key * iclr).unsqueeze(2) + v.unsqueeze(3) * k.unsqueeze(2)
    wkv.copy_(new)
    y = (new * r.unsqueeze(2)).sum(dim=3)
    y = y - y.mean(dim=-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + weights.eps) * norm_weight + norm_bias
    y = y + (r * k * r_k).sum(dim=-1, keepdim=True) * v
    return (y * gate).view(n, H * N).to(inputs.r.dtype)
