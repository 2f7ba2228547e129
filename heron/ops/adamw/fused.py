"""AdamW by the kernels of PyTorch, which want gradients in the dtype of the weights and know nothing of copies."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def adamw_fused(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """See :func:`heron.ops.adamw.adamw_`."""
    gradients = [gradient.to(weight.dtype) for gradient, weight in zip(gradients, weights, strict=True)]
    torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        weights, gradients, exp_avgs, exp_avg_sqs, [], steps, lr=lr, beta1=betas[0], beta2=betas[1],
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False, grad_scale=grad_scale, found_inf=found_inf,
    )  # fmt: skip
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))  # pyright: ignore[reportPrivateImportUsage]
    if copies:
        torch._foreach_copy_(copies, weights)  # pyright: ignore[reportPrivateImportUsage]
