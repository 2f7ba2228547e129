"""The kernel of head_step (csrc/head_step.cu), built at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.ops import _build, _choice
from heron.ops.head_step.reference import HeadInputs, HeadWeights

SOURCE = Path(__file__).parent / "csrc" / "head_step.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (16, 32, 64, 128)


def head_step_cuda(
    inputs: HeadInputs,
    weights: HeadWeights,
    wkv: Tensor,
    new_wkv: Tensor,
    drawn: Tensor | None = None,
    settled: bool = False,
) -> Tensor:
    """See :func:`heron.ops.head_step`; KernelError as :meth:`FORM.require`."""
    FORM.require(wkv.device, inputs.r.dtype, wkv.shape[3])
    of_values = [x for x in (inputs.value, inputs.v_first, weights.v0) if x is not None]
    return torch.ops.heron.head_step(inputs[:6], weights[:7], of_values, weights.eps, wkv, new_wkv, drawn, settled)


def why_not(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why the kernel does not run for such heads, as a clause; None where it does."""
    if head_size not in HEAD_SIZES:
        return f"it takes heads of {', '.join(map(str, HEAD_SIZES))}, not of {head_size}"
    return _choice.why_not_dtype(dtype, DTYPES)


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "head_step", "head_step", [SOURCE], [_build.EARLY, _build.HEAD])


FORM = _choice.NativeForm("head_step", "cuda", "the time mix of one token", why_not, library)
