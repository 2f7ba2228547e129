"""The kernel of head_step (csrc/head_step.cu), built at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _build
from heron.ops.head_step.reference import HeadInputs, HeadWeights

SOURCE = Path(__file__).parent / "csrc" / "head_step.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (16, 32, 64, 128)


def head_step_cuda(inputs: HeadInputs, weights: HeadWeights, wkv: Tensor) -> Tensor:
    """See :func:`heron.ops.head_step`.

    Raises:
        KernelError: no CUDA device, or one older than 8.0, what :func:`why_not` says, or the kernel can't be built.
    """
    if wkv.device.type != "cuda":
        raise KernelError(f'head_step: impl="cuda" needs tensors on a CUDA device, got {wkv.device}')
    if reason := why_not(inputs.r.dtype, wkv.shape[3]):
        raise KernelError(f'head_step: impl="cuda": {reason}; use impl="auto"')
    library(torch.cuda.get_device_capability(wkv.device))
    return torch.ops.heron.head_step(inputs[:6], inputs.value_logits, inputs.v_first, weights[:5], weights.eps, wkv)


def why_not(dtype: torch.dtype, head_size: int) -> str | None:
    """Why the kernel does not run for such heads, as a clause; None where it does."""
    if dtype not in DTYPES:
        return f"it takes fp32, bf16 and fp16, not {dtype}"
    if head_size not in HEAD_SIZES:
        return f"it takes heads of {', '.join(map(str, HEAD_SIZES))}, not of {head_size}"
    return None


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError as above."""
    _build.load_kernels_for(capability, "head_step", "head_step", [SOURCE], [_build.EARLY])
