"""The rows of the loss on CUDA (csrc/loss_rows.cu), built at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.ops import _build, _choice

SOURCE = Path(__file__).parent / "csrc" / "loss_rows.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def loss_rows_cuda(logits: Tensor, targets: Tensor, l2wrap: float, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """See :func:`heron.ops.linear_cross_entropy.chunked.loss_rows`; the gradient takes the place of the logits."""
    return torch.ops.heron.loss_rows_(logits, targets, l2wrap, with_gradient), logits


def scaled_cuda(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` times a number in fp32 on its device, computed in fp32, in `dtype`: read once, written once."""
    return torch.ops.heron.scaled(x, scale, torch.empty(0, dtype=dtype, device=x.device))


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel does not take logits of `dtype`, as a clause; None where it does."""
    return _choice.why_not_dtype(dtype, DTYPES)


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "linear_cross_entropy", "loss_rows", [SOURCE])


FORM = _choice.NativeForm("linear_cross_entropy", "cuda", "the loss", why_not, library)
