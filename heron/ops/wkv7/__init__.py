"""WKV7: the recurrence with a matrix state that RWKV-7 and RWKV-8 share. README.md derives its forms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice, _packed
from heron.ops.spans import Span
from heron.ops.wkv7 import cuda
from heron.ops.wkv7 import span as spanned
from heron.ops.wkv7.chunked import wkv7_chunked
from heron.ops.wkv7.packed import wkv7_packed
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
    span: Span | None = None,
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
        span: the tokens are a span of a longer text, whose other spans are computed elsewhere at the same time
            (:mod:`heron.ops.spans`). A sequence that began in a span before has its state and its gradients from there:
            its `state` is not read. S is that after this span's last token.

    Returns:
        y: (B, T, H, N) in the dtype of the inputs.
        S: (B, H, N_value, N_key), the state after the last token, fp32 (fp64 for fp64 inputs); with `cu_seqlens`
        (n_seq, H, N_value, N_key), one for each sequence, and so is `state`.
        Gradients flow to all six inputs and to `state`, from y and from S.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together, or an `impl` that does not exist or can't run
            here.
    """
    impl = _checked("wkv7", dict(r=r, w=w, k=k, v=v, a=a, b=b), impl)
    n_seq = r.shape[0] if cu_seqlens is None else _packed.count("wkv7", r, cu_seqlens)
    initial = initial_state(r, n_seq, state)
    form = _FORMS[impl]
    if span is not None:
        if impl == "cuda":
            cuda.FORM.require(r.device, r.dtype, r.shape[-1])
        initial, own, transfers = spanned.enter(impl, span, w, k, v, a, b, initial)
        y, final = _run(form, impl, (r, w, k, v, a, b), initial, cu_seqlens)
        return spanned.leave(impl, span, y, final, own, transfers, r, w, k, v, a, b)
    return _run(form, impl, (r, w, k, v, a, b), initial, cu_seqlens)


def wkv7_span(w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """What the recurrence of :func:`wkv7` does to a state over a span of tokens: ``S_out = S_in P + C``.

    P is the product of ``diag(decay) + a b^T`` over the tokens, in their order; C is the state that the span leaves
    behind from zero. Spans one after another compose, so each can be computed alone. No gradient flows.

    Args:
        w, k, v, a, b: (B, T, H, N) as for :func:`wkv7`.
        impl: as there; "auto" chooses as there.

    Returns:
        P (B, H, N_key, N_key) and C (B, H, N_value, N_key), fp32 (fp64 for fp64 inputs).

    Raises:
        KernelError: as :func:`wkv7`.
    """
    impl = _checked("wkv7_span", dict(w=w, k=k, v=v, a=a, b=b), impl)
    if impl == "cuda":
        cuda.FORM.require(w.device, w.dtype, w.shape[-1])
    with torch.no_grad(), torch.autocast(w.device.type, enabled=False):
        return spanned.composed(*spanned.MAPS[impl](w, k, v, a, b))


def wkv7_span_gradient(r: Tensor, w: Tensor, a: Tensor, b: Tensor, dy: Tensor, impl: str = "auto") -> Tensor:
    """The part D of ``dS_in = dS_out P^T + D`` over a span of tokens (:func:`wkv7_span`): what comes of its own y.

    Args:
        r, w, a, b: (B, T, H, N) as for :func:`wkv7`; D depends on nothing else.
        dy: (B, T, H, N), the gradient of y.
        impl: as for :func:`wkv7_span`.

    Returns:
        (B, H, N_value, N_key), fp32 (fp64 for fp64 inputs).

    Raises:
        KernelError: as :func:`wkv7`.
    """
    impl = _checked("wkv7_span_gradient", dict(r=r, w=w, a=a, b=b, dy=dy), impl)
    if impl == "cuda":
        cuda.FORM.require(r.device, r.dtype, r.shape[-1])
    with torch.no_grad(), torch.autocast(r.device.type, enabled=False):
        local = spanned.GRADIENTS[impl](r, w, a, b, dy)
        if len(local) == 1:
            return local[0]
        transfer, _ = spanned.MAPS[impl](w, b, torch.zeros_like(b), a, b)
        return spanned.composed_backwards(transfer, local)


def _run(
    form: Callable[..., tuple[Tensor, Tensor]],
    impl: str,
    inputs: tuple[Tensor, ...],
    initial: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if impl == "cuda":
        return form(*inputs, initial, cu_seqlens)
    if cu_seqlens is None:
        return form(*inputs, initial)
    return wkv7_packed(form, inputs, initial, cu_seqlens)


def _checked(op: str, inputs: dict[str, Tensor], impl: str) -> str:
    """The form that `impl` names for these inputs; KernelError where they do not fit together or it is none."""
    (first, x), *others = inputs.items()
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise KernelError(f"{op}: {first} must be (B, T, H, N) with T >= 1, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise KernelError(f"{op}: {first} must be of a floating dtype, got {x.dtype}")
    for name, other in others:
        if other.shape != x.shape or other.dtype != x.dtype or other.device != x.device:
            raise KernelError(
                f"{op}: {name} must match {first}, {tuple(x.shape)} {x.dtype} on {x.device}; "
                f"got {tuple(other.shape)} {other.dtype} on {other.device}"
            )
    if impl == "auto":
        impl = wkv7_choice(x.device, x.shape[1], x.dtype, x.shape[-1]).impl
    _choice.form_of(op, impl, _FORMS)
    return impl


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
