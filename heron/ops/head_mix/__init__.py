"""What a time mix computes between its projections and its output matrix, as one operator. README.md says how."""

from __future__ import annotations

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice
from heron.ops.head_mix import cuda
from heron.ops.head_mix.reference import head_mix_reference
from heron.ops.head_step.reference import HeadInputs, HeadWeights
from heron.ops.spans import Span

__all__ = ["HeadInputs", "HeadWeights", "head_mix", "head_mix_choice", "head_mix_reference"]
_FORMS = {"reference": head_mix_reference, "cuda": cuda.head_mix_cuda}


def head_mix_choice(device: torch.device, dtype: torch.dtype = torch.bfloat16, head_size: int = 64) -> _choice.Choice:
    """The form that "auto" takes for inputs of `dtype` and `head_size` on `device`."""
    other = _choice.Choice("reference", f"plain PyTorch around WKV7; runs on {device.type}")
    reason = "a kernel before that of WKV7 and one after it, each number read once"
    return cuda.FORM.choice(reason, other, device, dtype, head_size)


def head_mix(
    inputs: HeadInputs,
    weights: HeadWeights,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    span: Span | None = None,
) -> tuple[Tensor, Tensor]:
    """What the output matrix of a time mix is multiplied with: gates, WKV7, norm and bonus of every head::

        v           <- v + (v_first - v) sigmoid(v0 + value)             where there is v_first
        iclr         = sigmoid(a0 + iclr)
        removal_key  = k k_k / max(|k k_k|, 1e-12)                       per head, as the sum below
        k           <- k (1 + (iclr - 1) k_a)
        y, S         = wkv7(r, w0 + w, k, v, -removal_key, removal_key iclr, state)
        y            = (group_norm(y; norm_weight, norm_bias, eps) + (sum of r k r_k) v) gate

    :func:`heron.ops.head_step` is the same for one token, without gradients.
    Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py.

    Args:
        inputs: :class:`HeadInputs`, (B, T, C) each, T >= 1. WKV7 runs in the dtype of r.
        weights: :class:`HeadWeights`; r_k is (H, N) with H N = C.
        state: (B, H, N_value, N_key), the state before the first token; None: zeros. It is never modified.
        cu_seqlens: as in :func:`heron.ops.wkv7`: sequences packed along T with B = 1, each with a state of its own;
            `state` and S are then (n_seq, H, N_value, N_key).
        impl: "reference" (PyTorch around :func:`heron.ops.wkv7`, with its "auto"), "cuda" (a kernel before that of WKV7
            and one after it, built at first use; all tensors in one dtype), or "auto": "cuda" where it runs.
        span: as in :func:`heron.ops.wkv7`: the tokens are a span of a longer text.

    Returns:
        y: (B, T, C).
        S: (B, H, N_value, N_key), the state after the last token, fp32 (fp64 for fp64 inputs).
        Gradients flow to all inputs, to the weights and to `state`, from y and from S.

    Raises:
        KernelError: shapes that do not fit together, or an `impl` that does not exist or can't run here.
    """
    _check(inputs, weights)
    r, head_size = inputs.r, weights.r_k.shape[-1]
    named = (*inputs._asdict().items(), *weights._asdict().items())
    odd = next(((name, x.dtype) for name, x in named if isinstance(x, Tensor) and x.dtype != r.dtype), None)
    if impl == "auto":
        impl = "reference" if odd else head_mix_choice(r.device, r.dtype, head_size).impl
    elif impl == "cuda":
        if odd:
            raise KernelError(
                f'head_mix: impl="cuda": it takes all tensors in the dtype of r, {r.dtype}, and {odd[0]} is {odd[1]}; '
                'use impl="auto"'
            )
        cuda.FORM.require(r.device, r.dtype, head_size)
    return _choice.form_of("head_mix", impl, _FORMS)(inputs, weights, state, cu_seqlens, span=span)


def _check(inputs: HeadInputs, weights: HeadWeights) -> None:
    r, r_k = inputs.r, weights.r_k
    if r.dim() != 3 or r.shape[1] == 0:
        raise KernelError(f"head_mix: r must be (B, T, C) with T >= 1, got {tuple(r.shape)}")
    if r_k.dim() != 2 or r_k.numel() != r.shape[2]:
        raise KernelError(f"head_mix: r_k must be (H, N) with H N = C = {r.shape[2]}, got {tuple(r_k.shape)}")
    if len({x is None for x in (inputs.value, inputs.v_first, weights.v0)}) > 1:
        raise KernelError("head_mix: value, v_first and v0 come together, or not at all")
    for name, x in inputs._asdict().items():
        if x is not None and x.shape != r.shape:
            raise KernelError(f"head_mix: {name} must have the shape of r, {tuple(r.shape)}; got {tuple(x.shape)}")
    for name, x in weights._asdict().items():
        if isinstance(x, Tensor) and x.numel() != r.shape[2]:
            raise KernelError(f"head_mix: {name} must have C = {r.shape[2]} values; got {tuple(x.shape)}")
