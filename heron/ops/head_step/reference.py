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


def head_step_reference(
    inputs: HeadInputs,
    weights: HeadWeights,
    wkv: Tensor,
    new_wkv: Tensor,
    drawn: Tensor | None = None,
    settled: bool = False,
) -> Tensor:
    """The definition; see :func:`heron.ops.head_step`."""
    n, H, N, _ = wkv.shape
    rounded = new_wkv
    if drawn is not None:
        wkv = wkv.to(torch.promote_types(inputs.r.dtype, torch.float32))
        new_wkv = torch.empty_like(wkv)

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
    if drawn is not None:
        rounded.copy_(rounded_at_random(new_wkv.float(), drawn))
    y = _times(new_wkv, r)
    y = F.layer_norm(y, (N,), eps=weights.eps) * norm_weight + norm_bias
    y = y + (r * k * r_k).sum(dim=-1, keepdim=True) * v
    return (y * gate).view(n, H * N).to(inputs.r.dtype)


def rounded_at_random(x: Tensor, drawn: Tensor) -> Tensor:
    """x (n, ...) in fp32 -> bf16: one of the two neighbours of each number, the nearer the likelier.

    Which one depends on its place and on the sequence's `drawn` (n,), int64.
    """
    places = torch.arange(x[0].numel(), device=x.device).view(1, *x.shape[1:])
    random = _mixed(_mixed(drawn & _WORD).view(-1, *[1] * (x.dim() - 1)) + places & _WORD)
    bits = (x.view(torch.int32) + (random & 0xFFFF).to(torch.int32)) & ~0xFFFF  # no carry leaves a finite exponent
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


_WORD = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    """32 bits at random for every x of 32 bits, in int64 (Wellons, "lowbias32")."""
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16


def _times(wkv: Tensor, key: Tensor) -> Tensor:
    """Each head's (N_value, N_key) times its key: (n, H, N_value)."""
    if wkv.device.type == "cpu":
        return (key.unsqueeze(2) @ wkv.mT).squeeze(2)
    return (wkv * key.unsqueeze(2)).sum(dim=3)  # torch.compile makes one kernel of this and what is around it
