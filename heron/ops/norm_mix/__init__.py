"""One token's layer norm, mixed with the token before it: what products begin from. README.md says how."""

from __future__ import annotations

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice
from heron.ops.norm_mix import cuda
from heron.ops.norm_mix.reference import norm_mix_reference

__all__ = ["norm_mix", "norm_mix_choice"]
_FORMS = {"reference": norm_mix_reference, "cuda": cuda.norm_mix_cuda}


def norm_mix_choice(device: torch.device, dtype: torch.dtype = torch.bfloat16, channels: int = 768) -> _choice.Choice:
    """The form that "auto" takes for tokens of `dtype` and `channels` on `device`."""
    other = _choice.Choice("reference", f"elementwise, in PyTorch; runs on {device.type}")
    return cuda.FORM.choice("a block of threads a token", other, device, dtype, channels)


def norm_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mixes: Tensor,
    last: Tensor,
    new_last: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``now = layer_norm(x)``, which `new_last` becomes; ``now + (last - now) mix`` for each of `mixes`.

    Computed in fp32 (fp64 for fp64); `now` is rounded before it is mixed. No gradients.

    Args:
        x: (n, C), one token of n sequences; like all tensors contiguous, of one dtype, on one device.
        weight, bias: (C,) of the norm.
        eps: of the norm.
        mixes: (m, C); m = 0 norms alone.
        last: (n, C), `now` of the token before.
        new_last: (n, C), where `now` goes; None: into `last`.
        impl: "reference" (any device), "cuda" (a kernel, built at first use), or "auto": "cuda" where it runs.

    Returns:
        (m, n, C).

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together, an `impl` that does not exist or run here.
    """
    if x.dim() != 2 or mixes.dim() != 2 or not x.is_floating_point():
        raise KernelError(
            f"norm_mix: x must be (n, C) and mixes (m, C), floating; "
            f"got {tuple(x.shape)} {x.dtype}, {tuple(mixes.shape)}"
        )
    (n, C), m = x.shape, len(mixes)
    wanted = {"x": (x, (n, C)), "weight": (weight, (C,)), "bias": (bias, (C,)), "mixes": (mixes, (m, C))}
    new_last = last if new_last is None else new_last
    for name, (tensor, shape) in {**wanted, "last": (last, (n, C)), "new_last": (new_last, (n, C))}.items():
        if tuple(tensor.shape) != shape or tensor.dtype != x.dtype or not tensor.is_contiguous():
            raise KernelError(
                f"norm_mix: {name} must be {shape} {x.dtype} and contiguous, got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise KernelError(f"norm_mix: all tensors must be on {x.device}; {name} is on {tensor.device}")
    if impl == "auto":
        impl = norm_mix_choice(x.device, x.dtype, C).impl
    return _choice.form_of("norm_mix", impl, _FORMS)(x, weight, bias, eps, mixes, last, new_last)
