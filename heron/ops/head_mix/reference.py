"""The definition of head_mix, in PyTorch on any device and in any dtype up to fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from heron.ops.head_step.reference import LEAST_NORM, HeadInputs, HeadWeights
from heron.ops.spans import Span
from heron.ops.wkv7 import wkv7


def head_mix_reference(
    inputs: HeadInputs,
    weights: HeadWeights,
    state: Tensor | None,
    cu_seqlens: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    span: Span | None = None,
    rates: Callable[[Tensor, Tensor], Tensor] = lambda iclr, decay_logits: iclr,
) -> tuple[Tensor, Tensor]:
    """See :func:`heron.ops.head_mix`.

    Args:
        norm: on (B * T, C), stands in for the group norm of the weights.
        rates: of iclr and decay_logits (B, T, H, N), how much of what a key held is removed, in each key channel.
    """
    r, w, k, v, iclr, gate, value, v_first = inputs
    B, T, C = r.shape
    H, N = weights.r_k.shape
    per_head = (B, T, H, N)
    w = weights.w0 + w
    iclr = torch.sigmoid(weights.a0 + iclr)
    if v_first is not None and value is not None and weights.v0 is not None:  # all three come together
        v = torch.lerp(v, v_first, torch.sigmoid(weights.v0 + value).to(v.dtype))
    removal_key = F.normalize((k * weights.k_k).view(per_head), dim=-1, eps=LEAST_NORM)  # unit length per head
    k = k * (1 + (iclr - 1) * weights.k_a)

    r, w, k, v, iclr, removal_key = (x.to(r.dtype).view(per_head) for x in (r, w, k, v, iclr, removal_key))
    y, state = wkv7(r, w, k, v, -removal_key, removal_key * rates(iclr, w), state, cu_seqlens=cu_seqlens, span=span)

    y = y.reshape(B * T, C)
    y = F.group_norm(y, H, weights.norm_weight, weights.norm_bias, weights.eps) if norm is None else norm(y)
    y = y.view(per_head)
    bonus = (r * k * weights.r_k).sum(dim=-1, keepdim=True)  # (B, T, H, 1)
    return (y + bonus * v).view(B, T, C) * gate, state
