"""AdamW for many tensors at once, from gradients in bf16 or fp32, and their bf16 copies. README.md says how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice
from heron.ops.adamw import cuda
from heron.ops.adamw.fused import adamw_fused
from heron.ops.adamw.reference import adamw_reference

_FORMS = {"reference": adamw_reference, "fused": adamw_fused, "cuda": cuda.adamw_cuda}


def adamw_choice(device: torch.device, dtype: torch.dtype = torch.float32) -> _choice.Choice:
    """The form that "auto" takes for weights of `dtype` on `device`."""
    other = _choice.Choice("fused", f"PyTorch's fused AdamW; runs on {device.type}")
    reason = "one pass over gradients, weights, moments and the network's bf16 copies"
    return cuda.FORM.choice(reason, other, device, dtype)


def adamw_(
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
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """One step of AdamW for each of some tensors, in place. With t the steps it has had, s `grad_scale`::

        t <- t + 1,   g = gradient / s,   m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
        weight <- weight (1 - lr weight_decay) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
        copy   <- weight, rounded

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, as torch.optim.AdamW has it, whose state this
    is. Equal inputs give equal bits.

    Args:
        weights: contiguous, on one device; "cuda" takes fp32.
        gradients: of the shapes of `weights`; "cuda" takes bf16 or fp32, one dtype for all. They may be overwritten.
        exp_avgs, exp_avg_sqs: m and v, of the shapes and the dtype of `weights`.
        steps: t, fp32 scalars on the device.
        copies: bf16, of the shapes of `weights`; none at all where there is nothing to keep equal to them.
        grad_scale: an fp32 scalar on the device; None: 1.
        found_inf: an fp32 scalar on the device; where it is not 0 nothing is changed.
        impl: "reference", "fused" (PyTorch's kernels), "cuda" (one of ours, built at first use), or "auto": "cuda"
            where it runs, else "fused".

    Raises:
        KernelError: lists of different lengths, an `impl` that does not exist or run here.
    """
    if not weights:
        return
    lists = dict(gradients=gradients, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps, copies=copies or weights)
    for name, tensors in lists.items():
        if len(tensors) != len(weights):
            raise KernelError(f"adamw: as many {name} as weights, {len(weights)}; got {len(tensors)}")
    if impl == "auto":
        impl = adamw_choice(weights[0].device, weights[0].dtype).impl
    form = _choice.form_of("adamw", impl, _FORMS)
    form(weights, gradients, exp_avgs, exp_avg_sqs, steps, copies, lr, betas, eps, weight_decay, grad_scale, found_inf)
