"""The kernel of sample_rows (csrc/sample_rows.cu), built at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _build

SOURCE = Path(__file__).parent / "csrc" / "sample_rows.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sample_rows_cuda(
    logits: Tensor, counts: Tensor | None, barred: Tensor, settings: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`heron.ops.sample_rows`.

    Raises:
        KernelError: no CUDA device, or one older than 8.0, fp64 logits, or the kernel can't be built here.
    """
    if logits.device.type != "cuda":
        raise KernelError(f'sample_rows: impl="cuda" needs tensors on a CUDA device, got {logits.device}')
    if logits.dtype not in DTYPES:
        raise KernelError(f'sample_rows: impl="cuda" takes fp32, bf16 and fp16, got {logits.dtype}; use impl="auto"')
    library(torch.cuda.get_device_capability(logits.device))
    return torch.ops.heron.sample_rows(logits, counts, barred, settings, uniforms)


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError as above."""
    _build.load_kernels_for(capability, "sample_rows", "sample_rows", [SOURCE])
