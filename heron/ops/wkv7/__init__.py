"""WKV7: the recurrence with a matrix state that RWKV-7 and RWKV-8 share. README.md derives its forms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice, _packed
from heron.ops.wkv7 import cuda
from heron.ops.wkv7.chunked import wkv7_chunked
from heron.ops.wkv7.reference import wkv7_reference

_FORMS = {"reference": wkv7_reference, "chunked": wkv7_chunked, "cuda": cuda.wkv7_cuda}


def wkv7_choice(
    device: torch.device, n_tokens: int, dtype: torch.dtype = torch.bfloat16, head_size: int = 64
) -> _choice.Choice:
    """The form that "auto" takes for a sequence of `n_tokens` of `dtype` and `head_size` on `device`."""
    other = _choice.Choice("chunked", f"matrix products over chunks of tokens, in PyTorch; runs on {device.type}")
    if n_tokens == 1:
        other = _choice.Choice("reference", "one token is one step of the loop")
    arithmetic = "on tensor cores" if cuda.on_tensor_cores(dtype, head_size) else "in fp32 arithmetic"
    reason = f"kernels that run a head's chunks of tokens {arithmetic}"
    return cuda.FORM.choice(reason, other, device, dtype, head_size)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    impl: str = "auto",
    *,
    cu_seqlens: Tensor | None = None,
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
        impl: "reference" (the loop), "chunked" (matrix products over chunks), "cuda" (kernels for fp32, bf16 and fp16
            with N = 16, 32, 64 or 128, built at first use), or "auto".
        cu_seqlens: (n_seq + 1,) int32 or int64 on the device of `r`: sequences packed along T, with B = 1. Sequence i
            is tokens ``cu_seqlens[i]`` up to ``cu_seqlens[i + 1]`` and has a state of its own; it may be empty, and
            its state is then passed through. First 0, last T, never decreasing; "cuda" takes that on trust, since to
            look would make the host wait for the device.

    Returns:
        y: (B, T, H, N) in the dtype of the inputs.
        S: (B, H, N_value, N_key), the state after the last token, fp32 (fp64 for fp64 inputs); with `cu_seqlens`
        (n_seq, H, N_value, N_key), one for each sequence, and so is `state`.
        Gradients flow to all six inputs and to `state`, from y and from S.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together, or an `impl` that does not exist or can't run
            here.
    """
    _check_inputs(r, (w, k, v, a, b))
    n_seq = r.shape[0] if cu_seqlens is None else _packed.count("wkv7", r, cu_seqlens)
    initial = initial_state(r, n_seq, state)
    if impl == "auto":
        impl = wkv7_choice(r.device, r.shape[1], r.dtype, r.shape[-1]).impl
    form = _choice.form_of("wkv7", impl, _FORMS)
    if impl == "cuda":
        return form(r, w, k, v, a, b, initial, cu_seqlens)
    if cu_seqlens is None:
        return form(r, w, k, v, a, b, initial)
    return _sequence_by_sequence(form, (r, w, k, v, a, b), initial, cu_seqlens)


def _sequence_by_sequence(
    form: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], state: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """`form` over each packed sequence alone; an empty one keeps its state."""
    lengths = _packed.lengths("wkv7", inputs[0], cu_seqlens)
    ys, states = [], []
    for *xs, s in zip(*(x.split(lengths, dim=1) for x in inputs), state.split(1), strict=True):
        y, s = form(*xs, s) if xs[0].shape[1] else (xs[0], s)
        ys.append(y)
        states.append(s)
    return torch.cat(ys, dim=1), torch.cat(states)


def _check_inputs(r: Tensor, others: tuple[Tensor, ...]) -> None:
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


def initial_state(r: Tensor, n_seq: int, state: Tensor | None) -> Tensor:
    """The state before the first token, in the dtype that computes."""
    heads, size = r.shape[2:]
    dtype = torch.promote_types(r.dtype, torch.float32)
    if state is None:
        return r.new_zeros(n_seq, heads, size, size, dtype=dtype)
    if state.shape != (n_seq, heads, size, size) or state.device != r.device or not state.is_floating_point():
        raise KernelError(
            f"wkv7: state must be (B or n_seq, H, N_value, N_key) = {(n_seq, heads, size, size)}, floating, "
            f"on {r.device}; got {tuple(state.shape)} {state.dtype} on {state.device}"
        )
    return state.to(dtype)
