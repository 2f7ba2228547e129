"""Residual sum, LayerNorm, token shift and mixing as one operator. README.md says how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice, _packed
from heron.ops.shift_mix import cuda
from heron.ops.shift_mix.reference import shift_mix_reference, shifted

__all__ = ["shift_mix", "shift_mix_choice", "shift_mix_reference", "shifted"]
_FORMS = {"reference": shift_mix_reference, "cuda": cuda.shift_mix_cuda}


def shift_mix_choice(device: torch.device, dtype: torch.dtype = torch.bfloat16, channels: int = 768) -> _choice.Choice:
    """The form that "auto" takes for (B, T, `channels`) of `dtype` on `device`."""
    other = _choice.Choice("reference", f"plain PyTorch; runs on {device.type}")
    reason = "a block of threads a strip of tokens, each number read once"
    return cuda.FORM.choice(reason, other, device, dtype, channels)


def shift_mix(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mixes: Sequence[Tensor],
    last: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, list[Tensor], Tensor]:
    """What stands before the projections of a block::

        x        = x + branch
        n_t      = LayerNorm(x_t; weight, bias, eps)
        mixed_it = n_t + (n_{t-1} - n_t) mix_i,   n_{-1} = last

    Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py.

    Args:
        x: (B, T, C), the residual stream, a floating dtype, T >= 1.
        branch: (B, T, C), what the branch before gave and nobody has added yet; None: nothing.
        weight, bias: (C,) of the norm.
        mixes: C values each, of any shape that broadcasts to x. The kernels take 1, 2 or 6.
        last: (n_seq, C), the normed token before the first one of each sequence; None: zeros.
        cu_seqlens: (n_seq + 1,) int32 or int64 on the device of x: sequences packed along T, with B = 1, as in
            :func:`heron.ops.wkv7`; sequence i is tokens ``cu_seqlens[i]`` up to ``cu_seqlens[i + 1]``, and may be
            empty. None: each of the B rows is one sequence, n_seq = B.
        eps: of the norm.
        impl: "reference" (PyTorch), "cuda" (a kernel forward, two backward, built at first use; all tensors in one
            dtype), or "auto": "cuda" where it runs.

    Returns:
        x with the branch, (B, T, C) for each mix, and the last normed token of each sequence (n_seq, C), which is
        `last` of an empty one.

    Raises:
        KernelError: shapes of x, `last` or `cu_seqlens` that do not fit, an `impl` that does not exist or can't run
            here.
    """
    _check(x, last, cu_seqlens)
    others = (*mixes, weight, bias, *(extra for extra in (branch, last) if extra is not None))
    alike = len(mixes) in (1, 2, 6) and all(other.dtype == x.dtype for other in others)
    if impl == "auto":
        impl = shift_mix_choice(x.device, x.dtype, x.shape[-1]).impl if alike else "reference"
    elif impl == "cuda":
        if not alike:
            dtypes = ", ".join(sorted({str(other.dtype) for other in others}))
            raise KernelError(
                f'shift_mix: impl="cuda": it takes 1, 2 or 6 mixes and all tensors in the dtype of x, {x.dtype}, '
                f'not {len(mixes)} mixes and {dtypes}; use impl="auto"'
            )
        cuda.FORM.require(x.device, x.dtype, x.shape[-1])
    return _choice.form_of("shift_mix", impl, _FORMS)(
        x, branch, weight, bias, mixes, last, cu_seqlens, eps
    )  # fmt: skip


def _check(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise KernelError(f"shift_mix: x must be (B, T, C) with T >= 1, got {tuple(x.shape)}")
    n_seq = x.shape[0] if cu_seqlens is None else _packed.count("shift_mix", x, cu_seqlens)
    if last is not None and last.shape != (n_seq, x.shape[2]):
        raise KernelError(f"shift_mix: last must be (n_seq, C) = {(n_seq, x.shape[2])}, got {tuple(last.shape)}")
