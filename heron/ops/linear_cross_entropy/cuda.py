"""The rows of the loss on CUDA (csrc/loss_rows.cu), built at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _build

SOURCE = Path(__file__).parent / "csrc" / "loss_rows.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def loss_rows_cuda(logits: Tensor, targets: Tensor, l2wrap: float, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """See :func:`heron.ops.linear_cross_entropy.chunked.loss_rows`; the gradient takes the place of the logits."""
    return torch.ops.heron.loss_rows_(logits, targets, l2wrap, with_gradient), logits


def require(device: torch.device, dtype: torch.dtype) -> None:
    """Build and load the kernel for logits of `dtype` on `device`.

    Raises:
        KernelError: it is no CUDA device, or one older than 8.0, `dtype` is fp64, or the kernel can't be built here.
    """
    if device.type != "cuda":
        raise KernelError(
            f'linear_cross_entropy: impl="cuda" needs tensors on a CUDA device, got {device}; use impl="auto"'
        )
    if dtype not in DTYPES:
        raise KernelError(f'linear_cross_entropy: impl="cuda" takes fp32, bf16 and fp16, got {dtype}; use impl="auto"')
    library(torch.cuda.get_device_capability(device))


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError as in :func:`require`."""
    _build.load_kernels_for(capability, "linear_cross_entropy", "loss_rows", [SOURCE])
