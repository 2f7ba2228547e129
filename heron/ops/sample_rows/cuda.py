"""The kernel of sample_rows (csrc/sample_rows.cu), built at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.ops import _build, _choice

SOURCE = Path(__file__).parent / "csrc" / "sample_rows.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sample_rows_cuda(
    logits: Tensor, counts: Tensor | None, barred: Tensor, settings: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`heron.ops.sample_rows`; KernelError as :meth:`FORM.require`."""
    FORM.require(logits.device, logits.dtype)
    return torch.ops.heron.sample_rows(logits, counts, barred, settings, uniforms)


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "sample_rows", "sample_rows", [SOURCE])


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel does not draw from logits of `dtype`, as a clause; None where it does."""
    return _choice.why_not_dtype(dtype, DTYPES)


FORM = _choice.NativeForm("sample_rows", "cuda", "drawing tokens", why_not, library)
