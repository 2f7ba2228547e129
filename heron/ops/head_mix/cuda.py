"""The op on CUDA: csrc/head_mix.cu around the kernels of WKV7, as one operator of PyTorch.

``heron::head_mix_before``, ``_after`` and their backward launch kernels: the source implements them for CUDA, and the
tests implement them for a CPU. ``heron::head_mix_kernels`` above them knows its gradient and its shapes, and so works
under torch.compile, CUDA graphs and checkpointing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from heron.ops import _build, _choice
from heron.ops.head_step.reference import HeadInputs, HeadWeights
from heron.ops.spans import Span
from heron.ops.wkv7 import cuda as wkv7_cuda
from heron.ops.wkv7 import initial_state

SOURCE = Path(__file__).parent / "csrc" / "head_mix.cu"
DTYPES = (torch.float32, torch.bfloat16)

_library = torch.library.Library("heron", "FRAGMENT")
# What each takes and gives is listed in csrc/head_mix.cu, in the same order; gradients of weights, which are sums over
# tokens, are given if `of_weights`, and last, but for what after_backward tells before_backward of every head:
# (B, T, H, 2).
for _schema in (
    "head_mix_before(Tensor[] inputs, Tensor[] weights, int head_size)",
    "head_mix_after(Tensor[] inputs, Tensor[] weights, int head_size, float eps)",
    "head_mix_after_backward(Tensor[] inputs, Tensor[] weights, int head_size, float eps, bool of_weights)",
    "head_mix_before_backward(Tensor[] inputs, Tensor[] weights, Tensor of_heads, int head_size, bool of_weights)",
    "head_mix_kernels(Tensor r, Tensor w, Tensor k, Tensor v, Tensor iclr, Tensor gate, Tensor? value, Tensor? v_first,"
    " Tensor w0, Tensor a0, Tensor k_k, Tensor k_a, Tensor r_k, Tensor norm_weight, Tensor norm_bias, float eps,"
    " Tensor? v0, Tensor state, Tensor? cu_seqlens, str? chain, Tensor? edges, bool save)",
    "head_mix_kernels_backward(Tensor d_y, Tensor? d_final, Tensor[] inputs, Tensor[] weights, Tensor[] kept,"
    " Tensor? cu_seqlens, str? chain, Tensor? edges, int n_states, float eps, bool of_weights)",
):
    _library.define(f"{_schema} -> Tensor[]")


def head_mix_cuda(
    inputs: HeadInputs,
    weights: HeadWeights,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    span: Span | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`heron.ops.head_mix`; the kernels must have been built (:meth:`FORM.require`)."""
    B, T, _ = inputs.r.shape
    n_seq = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = initial_state(inputs.r.view(B, T, *weights.r_k.shape), n_seq, state)
    tensors = [None if x is None else x.contiguous() for x in inputs]
    of_channels = [x.reshape(-1) if isinstance(x, Tensor) else x for x in weights]
    of_channels[HeadWeights._fields.index("r_k")] = weights.r_k.contiguous()
    given = [x for x in (*tensors, *of_channels, state) if isinstance(x, Tensor)]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    y, final, *_ = torch.ops.heron.head_mix_kernels(
        *tensors, *of_channels, state, cu_seqlens, *(span or (None, None)), save
    )  # fmt: skip
    return y, final


def why_not(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why there are no kernels for heads of `dtype` and `head_size`, as a clause; None where there are."""
    return _choice.why_not_dtype(dtype, DTYPES) or wkv7_cuda.why_not(device, dtype, head_size)


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernels, WKV7's too, for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "head_mix", "head_mix", [SOURCE], [_build.STRIPS, _build.COPIES])
    wkv7_cuda.library(capability)


FORM = _choice.NativeForm("head_mix", "cuda", "the heads of the time mix", why_not, library)


def _forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    iclr: Tensor,
    gate: Tensor,
    value: Tensor | None,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    v0: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    chain: str | None,
    edges: Tensor | None,
    save: bool,
) -> list[Tensor]:
    """y, the final state, and to `save` what WKV7 gave, its inputs but r (v where it is not v), and what it keeps."""
    B, T, _ = r.shape
    head_size = r_k.shape[1]
    of_first = [[], []] if v_first is None else [[v, value, v_first], [v0]]
    decay_logits, k, a, b, *mixed = torch.ops.heron.head_mix_before(
        [w, k, iclr, *of_first[0]], [w0, a0, k_k, k_a, *of_first[1]], head_size
    )
    v = mixed[0] if mixed else v
    recurrent = [x.view(B, T, *r_k.shape) for x in (r, decay_logits, k, v, a, b)]
    tensor_cores = wkv7_cuda.on_tensor_cores(r.dtype, head_size)
    if chain is not None:
        wkv, final, *kept = torch.ops.heron.wkv7_span_kernels(
            *recurrent, state, cu_seqlens, chain, edges, save, tensor_cores
        )
    elif T <= wkv7_cuda.STEP_TOKENS and not save:
        wkv, final = torch.ops.heron.wkv7_kernels_step(*recurrent, state, cu_seqlens)
        kept = []
    else:
        wkv, final, *kept = torch.ops.heron.wkv7_kernels(*recurrent, state, cu_seqlens, save, tensor_cores)
    after = [wkv, r, k, v, gate], [r_k, norm_weight, norm_bias]
    (y,) = torch.ops.heron.head_mix_after(*after, head_size, eps)
    return [y, final, *([wkv, decay_logits, k, a, b, *mixed, *kept] if save else [])]


def _backward(
    d_y: Tensor,
    d_final: Tensor | None,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    chain: str | None,
    edges: Tensor | None,
    n_states: int,
    eps: float,
    of_weights: bool,
) -> list[Tensor]:
    """The gradients of r to gate, of the state, of value and v_first if there are, and of w0 to v0 if `of_weights`."""
    r, k, v, iclr, gate, *of_first = inputs
    a0, k_k, k_a, r_k, norm_weight, norm_bias, *v0 = weights
    wkv, decay_logits, wkv_k, a, b, *kept = kept
    wkv_v = kept.pop(0) if of_first else v
    head_size = r_k.shape[1]
    d_wkv, d_gate, *d_of_after, of_heads = torch.ops.heron.head_mix_after_backward(
        [wkv, r, wkv_k, wkv_v, gate, d_y], [r_k, norm_weight, norm_bias], head_size, eps, of_weights
    )
    recurrent = [x.view(wkv.shape) for x in (r, decay_logits, wkv_k, wkv_v, a, b)]
    backward, of_span = torch.ops.heron.wkv7_kernels_backward, ()
    if chain is not None:
        backward, of_span = torch.ops.heron.wkv7_span_kernels_backward, (chain, edges)
    *d_recurrent, d_state = backward(
        *(*recurrent, d_wkv.view(wkv.shape), d_final, *kept, cu_seqlens, *of_span),
        *(n_states, wkv7_cuda.on_tensor_cores(r.dtype, head_size)),
    )
    d_r, d_w, d_k, d_v, d_a, d_b = (x.view(r.shape) for x in d_recurrent)
    of_values = [v, *of_first] if of_first else []
    d_r, d_k, d_iclr, d_v, *rest = torch.ops.heron.head_mix_before_backward(
        [k, iclr, r, d_w, d_r, d_k, d_v, d_a, d_b, d_y, gate, *of_values],
        [a0, k_k, k_a, r_k, *v0],
        *(of_heads, head_size, of_weights),
    )
    d_of_first, d_of_before = rest[: len(of_first)], rest[len(of_first) :]
    d_weights = []
    if of_weights:
        d_r_k, *of_norm = d_of_after
        d_weights = [*d_of_before[:4], d_r_k.view(r_k.shape), *of_norm, *d_of_before[4:]]
    return [d_r, d_w, d_k, d_v, d_iclr, d_gate, d_state, *d_of_first, *d_weights]


class _Kernels(torch.autograd.Function):
    """The gradient of ``heron::head_mix_kernels``."""

    @staticmethod
    def forward(ctx, *arguments):
        r, _, *inputs = arguments[:8]
        _, *weights, ctx.eps, v0, state, cu_seqlens, ctx.chain, edges, _ = arguments[8:]
        y, final, *kept = _below_autograd(*arguments)
        ctx.mixes, ctx.n_states = v0 is not None, state.shape[0]
        ctx.save_for_backward(r, *inputs, *weights, v0, cu_seqlens, edges, *kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept)
        return y, final, *kept

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_final, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors = ctx.saved_tensors  # which checkpointing gives only once
        inputs, weights, (cu_seqlens, edges), kept = tensors[:7], tensors[7:14], tensors[14:16], tensors[16:]
        if not ctx.mixes:
            inputs, weights = inputs[:5], weights[:6]
        d_y = torch.zeros_like(inputs[0]) if d_y is None else d_y.contiguous()
        of_weights = any(ctx.needs_input_grad[8:17])
        gradients = torch.ops.heron.head_mix_kernels_backward(
            d_y, d_final, inputs, weights, kept, cu_seqlens, ctx.chain, edges, ctx.n_states, ctx.eps, of_weights
        )
        of_inputs, d_state, rest = gradients[:6], gradients[6], gradients[7:]
        of_first, rest = (rest[:2], rest[2:]) if ctx.mixes else ((None, None), rest)
        *d_weights, d_v0 = (*rest, *(None,) * (8 - len(rest)))
        return (*of_inputs, *of_first, *d_weights, None, d_v0, d_state, None, None, None, None)


def _below_autograd(*arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.heron.head_mix_kernels.default(*arguments)


def _with_gradient(*arguments):
    save = arguments[-1]
    return list(_Kernels.apply(*arguments)) if save else _below_autograd(*arguments)


for _device in ("CPU", "CUDA"):
    _library.impl("head_mix_kernels", _forward, _device)
    _library.impl("head_mix_kernels_backward", _backward, _device)
_library.impl("head_mix_kernels", _with_gradient, "Autograd")


# Shapes: the two above have them of what they call.
torch.library.register_fake("heron::head_mix_kernels", _forward, lib=_library)
torch.library.register_fake("heron::head_mix_kernels_backward", _backward, lib=_library)


def _like(x: Tensor, n: int) -> list[Tensor]:
    return [torch.empty_like(x) for _ in range(n)]


@torch.library.register_fake("heron::head_mix_before", lib=_library)
def _(inputs, weights, head_size):
    return _like(inputs[0], 4 if len(inputs) == 3 else 5)


@torch.library.register_fake("heron::head_mix_after", lib=_library)
def _(inputs, weights, head_size, eps):
    return _like(inputs[-1], 1)


@torch.library.register_fake("heron::head_mix_after_backward", lib=_library)
def _(inputs, weights, head_size, eps, of_weights):
    gate = inputs[4]
    heads = gate.new_empty(*gate.shape[:2], gate.shape[2] // head_size, 2, dtype=torch.float32)
    return [*_like(gate, 2), *_like(weights[1], 3 if of_weights else 0), heads]


@torch.library.register_fake("heron::head_mix_before_backward", lib=_library)
def _(inputs, weights, of_heads, head_size, of_weights):
    mixes = len(inputs) > 11
    sums = (5 if mixes else 4) if of_weights else 0
    return [*_like(inputs[0], 6 if mixes else 4), *_like(weights[0], sums)]
