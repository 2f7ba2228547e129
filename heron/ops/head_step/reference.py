"""The definition of head_step, in PyTorch on any device, in at least fp32."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_NORM = 1e-12


class HeadInputs(NamedTuple):
    """What the products of a time mix give, of one shape: (B, T, C) for head_mix, (n, C) for one token of n sequences.

    Low-rank ones are the product alone, before its bias.
    """

    r: Tensor
    w: Tensor
    """Of the decay logits."""
    k: Tensor
    v: Tensor
    iclr: Tensor
    """Of the logits of the in-context learning rate."""
    gate: Tensor
    value: Tensor | None = None
    """Of the logits of the mix of v with v_first; None in layer 0."""
    v_first: Tensor | None = None
    """Layer 0's v; None in layer 0."""


class HeadWeights(NamedTuple):
    """One layer's weights of single channels: C values each, of any shape that broadcasts to (B, T, C)."""

    w0: Tensor
    a0: Tensor
    k_k: Tensor
    k_a: Tensor
    r_k: Tensor
    """(H, N): it says what the heads are."""
    norm_weight: Tensor
    """(C,), as the next."""
    norm_bias: Tensor
    eps: float
    """Of the norm over a head."""
    v0: Tensor | None = None
    """None in layer 0."""


def head_step_reference(inputs: HeadInputs, weights: HeadWeights, wkv: Tensor, new_wkv: Tensor) -> Tensor:
    """The definition; see :func:`heron.ops.head_step`."""
    n, H, N, _ = wkv.shape

    def of_heads(x: Tensor, count: int) -> Tensor:
        return (x if x.dtype == wkv.dtype else x.to(wkv.dtype)).view(count, H, N)

    r, w, k, v, iclr, gate = (of_heads(x, n) for x in inputs[:6])
    w0, a0, k_k, k_a, r_k, norm_weight, norm_bias = (of_heads(x, 1) for x in weights[:7])
    if inputs.v_first is not None and inputs.value is not None and weights.v0 is not None:
        v_first, share = of_heads(inputs.v_first, n), torch.sigmoid(of_heads(weights.v0, 1) + of_heads(inputs.value, n))
        v = torch.lerp(v, v_first, share)
    iclr = torch.sigmoid(a0 + iclr)
    removal_key = F.normalize(k * k_k, dim=-1, eps=LEAST_NORM)
    k = k * (1 + (iclr - 1) * k_a)
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w0 + w))
    removed = _times(wkv, removal_key)
    torch.mul(wkv, decay.unsqueeze(2), out=new_wkv)
    new_wkv.addcmul_(removed.unsqueeze(3), (removal_key * iclr).unsqueeze(2), value=-1).addcmul_(
        v.unsqueeze(3), k.unsqueeze(2)
    )
    y = _times(new_wkv, r)
    y = F.layer_norm(y, (N,), eps=weights.eps) * norm_weight + norm_bias
    y = y + (r * k * r_k).sum(dim=-1, keepdim=True) * v
    return (y * gate).view(n, H * N).to(inputs.r.dtype)


def _times(wkv: Tensor, key: Tensor) -> Tensor:
    """Each head's (N_value, N_key) times its key: (n, H, N_value)."""
    if wkv.device.type == "cpu":
        return (key.unsqueeze(2) @ wkv.mT).squeeze(2)
    return (wkv * key.unsqueeze(2)).sum(dim=3)  # torch.compile makes one kernel of this and what is around it
