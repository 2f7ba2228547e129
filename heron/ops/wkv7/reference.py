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
