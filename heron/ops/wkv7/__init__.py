"""WKV7: the recurrence with a matrix state that RWKV-7 and RWKV-8 share. README.md derives its forms."""

from __future__ import annotations

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _select
from heron.ops.wkv7.chunked import wkv7_chunked
from heron.ops.wkv7.reference import wkv7_reference

_FORMS = {"reference": wkv7_reference, "chunked": wkv7_chunked}


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the RWKV-7 recurrence over a sequence, per head and token (columns of S are keys, rows are values)::

        decay = exp(-exp(-0.5) * sigmoid(w))
        S_t   = S_{t-1} diag(decay) + (S_{t-1} a) b^T + v k^T
        y_t   = S_t r

    RWKV calls it with ``a = -kk`` and ``b = kk * iclr``, kk being the key normalised per head.
    Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp (there `w` is raw as well).

    Args:
        r, w, k, v, a, b: (B, T, H, N), T >= 1, one floating dtype. `w` holds raw decay logits.
        state: (B, H, N_value, N_key), the state before the first token; None: zeros. It is never modified.
        impl: "reference" (the loop), "chunked" (matrix products over chunks), or "auto".

    Returns:
        y: (B, T, H, N) in the dtype of the inputs.
        S: (B, H, N_value, N_key), the state after the last token, fp32 (fp64 for fp64 inputs).
        Gradients flow to all six inputs and to `state`, from y and from S.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together, or an `impl` that does not exist.
    """
    state = _checked_state(r, (w, k, v, a, b), state)
    if impl == "auto":
        impl = _select.wkv7(r.device, r.shape[1]).impl
    if impl not in _FORMS:
        raise KernelError(f"wkv7: impl must be auto, {', '.join(_FORMS)}; got {impl!r}")
    return _FORMS[impl](r, w, k, v, a, b, state)


def _checked_state(r: Tensor, others: tuple[Tensor, ...], state: Tensor | None) -> Tensor:
    """Check that all inputs fit together and return the initial state in its computing dtype."""
    if r.dim() != 4 or 0 in r.shape[1:]:
        raise KernelError(f"wkv7: r must be (B, T, H, N) with T >= 1, got {tuple(r.shape)}")
    if not r.is_floating_point():
        raise KernelError(f"wkv7: r must be of a floating dtype, got {r.dtype}")
    for name, x in zip("wkvab", others, strict=True):
        if x.shape != r.shape or x.dtype != r.dtype or x.device != r.device:
            raise KernelError(
                f"wkv7: {name} must match r, {tuple(r.shape)} {r.dtype} on {r.device}; "
                f"got {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    batch, _, heads, size = r.shape
    dtype = torch.promote_types(r.dtype, torch.float32)
    if state is None:
        return r.new_zeros(batch, heads, size, size, dtype=dtype)
    if state.shape != (batch, heads, size, size) or state.device != r.device or not state.is_floating_point():
        raise KernelError(
            f"wkv7: state must be (B, H, N_value, N_key) = {(batch, heads, size, size)}, floating, on {r.device}; "
            f"got {tuple(state.shape)} {state.dtype} on {state.device}"
        )
    return state.to(dtype)
