"""The op on CUDA (csrc/shift_mix.cu) as operators of PyTorch; the kernels are built at first use."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from heron.ops import _build, _choice

SOURCE = Path(__file__).parent / "csrc" / "shift_mix.cu"
DTYPES = (torch.float32, torch.bfloat16)
LARGEST_C = 2048

_library = torch.library.Library("heron", "FRAGMENT")
# mixed, one for each mix; mean and 1 / deviation of each token (B T, 2) fp32; with a branch, its sum with x
_library.define(
    "shift_mix(Tensor x, Tensor? branch, Tensor weight, Tensor bias, Tensor[] mixes, float eps) -> Tensor[]"
)
# the gradients of x (and the branch), weight, bias, and of each mix
_library.define(
    "shift_mix_backward(Tensor[] d_mixed, Tensor? d_sum, Tensor sum, Tensor stats, Tensor weight, Tensor bias, "
    "Tensor[] mixes) -> Tensor[]"
)


def shift_mix_cuda(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, mixes: Sequence[Tensor], eps: float
) -> tuple[Tensor, list[Tensor]]:
    """See :func:`heron.ops.shift_mix`; the kernels must have been built (:meth:`FORM.require`)."""
    flat = [mix.reshape(-1) for mix in mixes]
    branch = None if branch is None else branch.contiguous()
    mixed = torch.ops.heron.shift_mix(x.contiguous(), branch, weight, bias, flat, eps)
    return (x if branch is None else mixed[-1]), mixed[: len(mixes)]


def why_not(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Why there is no kernel for x of `dtype` with `channels`, as a clause; None where there is one."""
    if channels % 8 or channels > LARGEST_C:
        return f"it takes C = 8, 16, ... {LARGEST_C}, not {channels}"
    return _choice.why_not_dtype(dtype, DTYPES)


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernels for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "shift_mix", "shift_mix", [SOURCE], [_build.STRIPS])


FORM = _choice.NativeForm("shift_mix", "cuda", "norm, token shift and mixing", why_not, library)


@torch.library.register_fake("heron::shift_mix", lib=_library)
def _(x, branch, weight, bias, mixes, eps):
    stats = x.new_empty(x.shape[0] * x.shape[1], 2, dtype=torch.float32)
    return [*(torch.empty_like(x) for _ in mixes), stats, *([] if branch is None else [torch.empty_like(x)])]


@torch.library.register_fake("heron::shift_mix_backward", lib=_library)
def _(d_mixed, d_sum, sum, stats, weight, bias, mixes):
    return [torch.empty_like(sum), *(torch.empty_like(weight) for _ in range(len(mixes) + 2))]


def _keep(ctx, inputs, output):
    x, branch, weight, bias, mixes, _ = inputs
    ctx.n_mixes, ctx.has_branch = len(mixes), branch is not None
    ctx.save_for_backward(output[-1] if ctx.has_branch else x, output[ctx.n_mixes], weight, bias, *mixes)


def _gradients(ctx, gradients):
    gradients = [gradient.contiguous() for gradient in gradients]
    d_mixed, d_sum = gradients[: ctx.n_mixes], gradients[-1] if ctx.has_branch else None
    d_x, d_weight, d_bias, *d_mixes = torch.ops.heron.shift_mix_backward(
        d_mixed, d_sum, *ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    )
    return d_x, d_x if ctx.has_branch else None, d_weight, d_bias, d_mixes, None


torch.library.register_autograd("heron::shift_mix", _gradients, setup_context=_keep, lib=_library)
