"""The norm of many tensors in one pass over them, and the verdict in one launch (csrc/global_norm.cu), built at first
use."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from heron.ops import _build, _choice

SOURCE = Path(__file__).parent / "csrc" / "global_norm.cu"
DTYPES = (torch.float32, torch.bfloat16)


def global_norm_cuda(tensors: Sequence[Tensor]) -> Tensor:
    """See :func:`heron.ops.global_norm.global_norm`; KernelError as :meth:`FORM.require`."""
    FORM.require(tensors[0].device, *{tensor.dtype for tensor in tensors})
    return torch.ops.heron.global_norm([tensor.detach().contiguous() for tensor in tensors])


def verdict_cuda(loss: Tensor, norm: Tensor, limit: float, clip: float) -> tuple[Tensor, Tensor]:
    """See :func:`heron.ops.global_norm.verdict`; KernelError as :meth:`FORM.require`."""
    FORM.require(loss.device, torch.float32)
    bad, divisor = torch.ops.heron.verdict(loss, norm, limit, clip).unbind()
    return bad, divisor


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernels for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "global_norm", "global_norm", [SOURCE], [_build.CHUNKS])


def why_not(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why the kernels do not read tensors of `dtypes`, as a clause; None where they do."""
    return next(filter(None, (_choice.why_not_dtype(dtype, DTYPES) for dtype in dtypes)), None)


FORM = _choice.NativeForm("global_norm", "cuda", "the norm of gradients", why_not, library)
