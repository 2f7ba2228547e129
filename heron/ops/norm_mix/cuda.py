"""The kernel of norm_mix (csrc/norm_mix.cu), built at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _build

SOURCE = Path(__file__).parent / "csrc" / "norm_mix.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def norm_mix_cuda(x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, last: Tensor) -> Tensor:
    """See :func:`heron.ops.norm_mix`.

    Raises:
        KernelError: no CUDA device, or one older than 8.0, what :func:`why_not` says, or the kernel can't be built.
    """
    if x.device.type != "cuda":
        raise KernelError(f'norm_mix: impl="cuda" needs tensors on a CUDA device, got {x.device}')
    if reason := why_not(x.dtype, x.shape[1]):
        raise KernelError(f'norm_mix: impl="cuda": {reason}; use impl="auto"')
    library(torch.cuda.get_device_capability(x.device))
    return torch.ops.heron.norm_mix(x, weight, bias, eps, mixes, last)


def why_not(dtype: torch.dtype, channels: int) -> str | None:
    """Why the kernel does not run for such tokens, as a clause; None where it does."""
    if dtype not in DTYPES:
        return f"it takes fp32, bf16 and fp16, not {dtype}"
    return f"it takes an even number of channels, not {channels}" if channels % 2 else None


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError as above."""
    _build.load_kernels_for(capability, "norm_mix", "norm_mix", [SOURCE], [_build.EARLY])
