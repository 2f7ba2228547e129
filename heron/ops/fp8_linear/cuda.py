"""What makes operands of products in e4m3 on a GPU (csrc/operands.cu), as operators of PyTorch, built at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.ops import _build, _choice

SOURCE = Path(__file__).parent / "csrc" / "operands.cu"
LARGEST_ROW = 2048  # that a warp holds

_library = torch.library.Library("heron", "FRAGMENT")
_library.define("fp8_rows(Tensor x, float smallest) -> (Tensor, Tensor)")
_library.define("fp8_turned(Tensor x, Tensor? factors) -> Tensor")


def rows_cuda(x: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """See :func:`heron.ops.fp8_linear.scaled.quantized`; of bf16, m up to LARGEST_ROW, 16, 32, ..."""
    return torch.ops.heron.fp8_rows(x.contiguous(), smallest)


def turned_cuda(x: Tensor, factors: Tensor | None = None) -> Tensor:
    """See :func:`heron.ops.fp8_linear.scaled.turned`; of n and m that are multiples of 16."""
    return torch.ops.heron.fp8_turned(x, factors)


@torch.library.register_fake("heron::fp8_rows", lib=_library)
def _(x, smallest):
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.register_fake("heron::fp8_turned", lib=_library)
def _(x, factors):
    return x.new_empty(x.shape[1], x.shape[0])


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernels for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "fp8_linear", "fp8_operands", [SOURCE])


FORM = _choice.NativeForm("fp8_linear", "cuda", "operands in fp8", lambda device: None, library)
