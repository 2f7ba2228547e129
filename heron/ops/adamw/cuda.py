"""AdamW for many tensors in one pass over memory (csrc/adamw.cu), built at first use."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from heron.ops import _build, _choice

SOURCE = Path(__file__).parent / "csrc" / "adamw.cu"


def adamw_cuda(
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
    """See :func:`heron.ops.adamw.adamw_`. The host does not wait for `found_inf`.

    Raises:
        KernelError: as :meth:`FORM.require`.
    """
    FORM.require(weights[0].device, weights[0].dtype)
    torch.ops.heron.adamw_(
        weights, gradients, exp_avgs, exp_avg_sqs, steps, copies, lr, *betas, eps, weight_decay, grad_scale, found_inf
    )


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "adamw", "adamw", [SOURCE], [_build.CHUNKS])


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel does not step weights of `dtype`, as a clause; None where it does."""
    return _choice.why_not_dtype(dtype, (torch.float32,))


FORM = _choice.NativeForm("adamw", "cuda", "AdamW", why_not, library)
