"""AdamW for many tensors in one pass over memory (csrc/adamw.cu), built at first use."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _build

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
        KernelError: no CUDA device, or one older than 8.0, weights not in fp32, or the kernel can't be built here.
    """
    device, dtype = weights[0].device, weights[0].dtype
    if device.type != "cuda":
        raise KernelError(f'adamw: impl="cuda" needs tensors on a CUDA device, got {device}')
    if dtype != torch.float32:
        raise KernelError(f'adamw: impl="cuda" takes weights in fp32, got {dtype}; use impl="auto"')
    library(torch.cuda.get_device_capability(device))
    torch.ops.heron.adamw_(
        weights, gradients, exp_avgs, exp_avg_sqs, steps, copies, lr, *betas, eps, weight_decay, grad_scale, found_inf
    )


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError as above."""
    _build.load_kernels_for(capability, "adamw", "adamw", [SOURCE])
