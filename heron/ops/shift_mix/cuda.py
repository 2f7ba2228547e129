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
# mixed, one for each mix; mean and 1 / deviation of each token, (B T, 2) fp32; the new last; with a branch, the sum
_library.define(
    "shift_mix(Tensor x, Tensor? branch, Tensor weight, Tensor bias, Tensor[] mixes, Tensor? last, Tensor? begins, "
    "float eps) -> Tensor[]"
)
# the gradients of x (and the branch), of weight, bias and each mix if `of_weights`, and of `last` if there is one
_library.define(
    "shift_mix_backward(Tensor[] d_mixed, Tensor? d_sum, Tensor? d_new_last, Tensor sum, Tensor stats, Tensor weight, "
    "Tensor bias, Tensor[] mixes, Tensor? last, Tensor? begins, bool of_weights) -> Tensor[]"
)


def shift_mix_cuda(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mixes: Sequence[Tensor],
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """See :func:`heron.ops.shift_mix`; the kernels must have been built (:meth:`FORM.require`)."""
    flat = [mix.reshape(-1) for mix in mixes]
    branch, last = (None if given is None else given.contiguous() for given in (branch, last))
    begins = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
    out = torch.ops.heron.shift_mix(x.contiguous(), branch, weight, bias, flat, last, begins, eps)
    n_mixes = len(mixes)
    return (x if branch is None else out[-1]), out[:n_mixes], out[n_mixes + 1]


def why_not(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Why there is no kernel for x of `dtype` with `channels`, as a clause; None where there is one."""
    if channels % 8 or channels > LARGEST_C:
        return f"it takes C = 8, 16, ... {LARGEST_C}, not {channels}"
    return _choice.why_not_dtype(dtype, DTYPES)


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernels for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "shift_mix", "shift_mix", [SOURCE], [_build.STRIPS, _build.COPIES])


FORM = _choice.NativeForm("shift_mix", "cuda", "norm, token shift and mixing", why_not, library)


@torch.library.register_fake("heron::shift_mix", lib=_library)
def _(x, branch, weight, bias, mixes, last, begins, eps):
    stats = x.new_empty(x.shape[0] * x.shape[1], 2, dtype=torch.float32)
    new_last = x.new_empty(x.shape[0] if begins is None else begins.shape[0] - 1, x.shape[2])
    sums = [] if branch is None else [torch.empty_like(x)]
    return [*(torch.empty_like(x) for _ in mixes), stats, new_last, *sums]


@torch.library.register_fake("heron::shift_mix_backward", lib=_library)
def _(d_mixed, d_sum, d_new_last, sum, stats, weight, bias, mixes, last, begins, of_weights):
    of_last = [] if last is None else [torch.empty_like(last)]
    n_weights = len(mixes) + 2 if of_weights else 0
    return [torch.empty_like(sum), *(torch.empty_like(weight) for _ in range(n_weights)), *of_last]


def _keep(ctx, inputs, output):
    x, branch, weight, bias, mixes, last, begins, _ = inputs
    ctx.set_materialize_grads(False)  # nobody reads the new last in a training step
    ctx.n_mixes, ctx.has_branch = len(mixes), branch is not None
    total = output[-1] if ctx.has_branch else x
    ctx.save_for_backward(total, output[ctx.n_mixes], weight, bias, last, begins, *mixes)


def _gradients(ctx, gradients):
    total, stats, weight, bias, last, begins, *mixes = ctx.saved_tensors
    *d_mixed, _, d_new_last, d_sum = (*gradients, *(() if ctx.has_branch else (None,)))
    d_mixed = [torch.zeros_like(total) if d is None else d.contiguous() for d in d_mixed]
    d_sum, d_new_last = (None if d is None else d.contiguous() for d in (d_sum, d_new_last))
    of_weights = any((*ctx.needs_input_grad[2:4], *ctx.needs_input_grad[4]))
    d_x, *rest = torch.ops.heron.shift_mix_backward(
        d_mixed, d_sum, d_new_last, total, stats, weight, bias, mixes, last, begins, of_weights
    )
    d_last = None if last is None else rest.pop()
    d_weight, d_bias, *d_mixes = rest if of_weights else (None,) * (ctx.n_mixes + 2)
    return d_x, d_x if ctx.has_branch else None, d_weight, d_bias, d_mixes, d_last, None, None


torch.library.register_autograd("heron::shift_mix", _gradients, setup_context=_keep, lib=_library)
