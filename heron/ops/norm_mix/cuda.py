"""The kernel of norm_mix (csrc/norm_mix.cu), built at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.ops import _build, _choice

SOURCE = Path(__file__).parent / "csrc" / "norm_mix.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def norm_mix_cuda(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, last: Tensor, new_last: Tensor
) -> Tensor:
    """See :func:`heron.ops.norm_mix`; KernelError as :meth:`FORM.require`."""
    FORM.require(x.device, x.dtype, x.shape[1])
    return torch.ops.heron.norm_mix(x, weight, bias, eps, mixes, last, new_last)


def why_not(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Why the kernel does not run for such tokens, as a clause; None where it does."""
    odd = f"it takes an even number of channels, not {channels}" if channels % 2 else None
    return _choice.why_not_dtype(dtype, DTYPES) or odd


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "norm_mix", "norm_mix", [SOURCE], [_build.EARLY])


FORM = _choice.NativeForm("norm_mix", "cuda", "layer norm and token shift", why_not, library)
