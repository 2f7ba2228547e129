"""WKV7, the definition: one token after another, in PyTorch, with autograd doing the backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def decay(decay_logits: Tensor) -> Tensor:
    """``exp(-exp(-0.5) * sigmoid(w))``, always in (0.5452, 1): what survives of a state column in one token."""
    return torch.exp(-math.exp(-0.5) * torch.sigmoid(decay_logits))


def wkv7_reference(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of :func:`heron.ops.wkv7`, literally. Inputs (B, T, H, N), state (B, H, N_value, N_key)."""
    dtype = r.dtype
    r, w, k, v, a, b = (x.to(state.dtype) for x in (r, w, k, v, a, b))
    d = decay(w)
    outputs = []
    for t in range(r.shape[1]):
        sa = state @ a[:, t].unsqueeze(-1)  # (B, H, N_value, 1), from the old state
        state = (
            state * d[:, t].unsqueeze(-2) + sa * b[:, t].unsqueeze(-2) + v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        )
        outputs.append((state @ r[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1).to(dtype), state


def span_reference(w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`heron.ops.wkv7_span`, literally: the recurrence from the identity without v, and from zero."""
    B, _, H, N = w.shape
    w, k, v, a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (w, k, v, a, b))
    transfer = torch.eye(N, dtype=w.dtype, device=w.device).repeat(B, H, 1, 1)
    local = torch.zeros_like(transfer)
    d = decay(w)
    for t in range(w.shape[1]):
        step = torch.diag_embed(d[:, t]) + a[:, t].unsqueeze(-1) * b[:, t].unsqueeze(-2)
        transfer = transfer @ step
        local = local @ step + v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
    return transfer, local


def span_gradient_reference(r: Tensor, w: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> Tensor:
    """:func:`heron.ops.wkv7_span_gradient`, literally."""
    B, T, H, N = w.shape
    r, w, a, b, dy = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (r, w, a, b, dy))
    d_state = w.new_zeros(B, H, N, N)
    d = decay(w)
    for t in reversed(range(T)):
        d_state = d_state + dy[:, t].unsqueeze(-1) * r[:, t].unsqueeze(-2)
        step = torch.diag_embed(d[:, t]) + a[:, t].unsqueeze(-1) * b[:, t].unsqueeze(-2)
        d_state = d_state @ step.mT
    return d_state
