"""Two products with a squared ReLU between them as one operator. README.md says how."""

from __future__ import annotations

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice
from heron.ops.squared_relu_mlp import cuda
from heron.ops.squared_relu_mlp.reference import squared_relu_mlp_reference

__all__ = ["squared_relu_mlp", "squared_relu_mlp_choice", "squared_relu_mlp_reference"]
_FORMS = {"reference": squared_relu_mlp_reference, "cuda": cuda.squared_relu_mlp_cuda}


def squared_relu_mlp_choice(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, tokens: int = 8192, depth: int = 768, hidden: int = 3072
) -> _choice.Choice:
    """The form that "auto" takes where gradients are wanted, of `tokens` x and a key (`hidden`, `depth`)."""
    other = _choice.Choice("reference", f"plain PyTorch; runs on {device.type}")
    reason = "what is elementwise at the end of a product"
    return cuda.FORM.choice(reason, other, device, dtype, tokens, depth, hidden)


def squared_relu_mlp(x: Tensor, key: Tensor, value: Tensor, impl: str = "auto") -> Tensor:
    """The two products of a channel mix::

        y = relu(x key^T)^2 value^T

    Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py.

    Args:
        x: (..., C), a floating dtype.
        key: (F, C).
        value: (C_out, F).
        impl: "reference" (PyTorch), "cuda" (compute capability 9.0, bf16: kernels for the product before the squared
            ReLU and for the one behind it in the backward, built at first use; the other products by PyTorch), or
            "auto": "cuda" where it runs, with tokens enough to fill the device, and gradients are wanted.

    Returns:
        y, (..., C_out).

    Raises:
        KernelError: shapes that do not fit, an `impl` that does not exist or can't run here.
    """
    n_hidden, n_in = key.shape
    if x.shape[-1] != n_in or value.shape[1] != n_hidden:
        raise KernelError(
            f"squared_relu_mlp: wanted x (..., C), key (F, C) and value (C_out, F); got {tuple(x.shape)}, "
            f"{tuple(key.shape)} and {tuple(value.shape)}"
        )
    n_tokens = x.numel() // max(n_in, 1)
    alike = key.dtype == value.dtype == x.dtype
    if impl == "auto":
        wanted = alike and torch.is_grad_enabled()
        impl = squared_relu_mlp_choice(x.device, x.dtype, n_tokens, n_in, n_hidden).impl if wanted else "reference"
    elif impl == "cuda":
        if not alike:
            dtypes = f"{x.dtype}, {key.dtype} and {value.dtype}"
            raise KernelError(f'squared_relu_mlp: impl="cuda": it takes one dtype, not {dtypes}; use impl="auto"')
        cuda.FORM.require(x.device, x.dtype, n_tokens, n_in, n_hidden)
    return _choice.form_of("squared_relu_mlp", impl, _FORMS)(x, key, value)
