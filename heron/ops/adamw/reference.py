"""AdamW in PyTorch, one tensor after another: the definition, of any dtype, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def adamw_reference(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """See :func:`heron.ops.adamw.adamw_`. It waits for `found_inf`."""
    if found_inf is not None and found_inf.item():
        return
    beta1, beta2 = betas
    for weight, gradient, m, v, step in zip(weights, gradients, exp_avgs, exp_avg_sqs, steps, strict=True):
        g = gradient.to(weight.dtype)
        if grad_scale is not None:
            g = g / grad_scale
        t = step.add_(1).double()
        m.lerp_(g, 1 - beta1)
        v.lerp_(g * g, 1 - beta2)
        scale = v.div(1 - beta2**t).sqrt_().add_(eps)
        weight.mul_(1 - lr * weight_decay).sub_(m.div(1 - beta1**t).mul_(lr).div_(scale))
    for copy, weight in zip(copies, weights if copies else (), strict=True):
        copy.copy_(weight)
