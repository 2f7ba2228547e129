"""AdamW by rows in PyTorch: the definition, of any dtype, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def row_adamw_reference(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_step: Tensor,
    gradient: Tensor,
    ids: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """See :func:`heron.ops.rows.row_adamw_`."""
    beta1, beta2 = betas
    t = row_step[ids] + 1
    m = exp_avg[ids].to(weight.dtype).lerp_(gradient, 1 - beta1)
    v = exp_avg_sq[ids].to(weight.dtype).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    for state, value in ((row_step, t), (exp_avg, m), (exp_avg_sq, v)):
        state[ids] = value.to(state.dtype)
    t = t.double().unsqueeze(1)
    step_size = (lr / (1 - beta1**t)).to(weight.dtype)
    of_v = (1 - beta2**t).sqrt().to(weight.dtype)
    weight[ids] = weight[ids].sub_(m.mul_(step_size).div_(v.sqrt_().div_(of_v).add_(eps)))
