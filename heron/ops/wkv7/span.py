"""WKV7 over a span of a text that several processes share (:mod:`heron.ops.spans`). README.md has the algebra.

Over a span S_out = S_in P + C: `transfer` is P, `local` is C. Backward, dS_in = dS_out P^T + D: `local` is then D.
Each span runs the recurrence as ever, from its true first state and with the true gradient of its last one; what is
here finds these two, each with one gather.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heron.ops import spans
from heron.ops.wkv7 import cuda
from heron.ops.wkv7.chunked import span_chunked, span_gradient_chunked
from heron.ops.wkv7.reference import span_gradient_reference, span_reference

# Both give a map for each of several runs of tokens, one after another: (n, B, H, N, N).
MAPS = {
    "reference": lambda *inputs: [x[None] for x in span_reference(*inputs)],
    "chunked": lambda *inputs: [x[None] for x in span_chunked(*inputs)],
    "cuda": cuda.span_kernels,
}
GRADIENTS = {
    "reference": lambda *inputs: span_gradient_reference(*inputs)[None],
    "chunked": lambda *inputs: span_gradient_chunked(*inputs)[None],
    "cuda": cuda.span_gradient_kernels,
}


def composed(transfer: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """The maps S -> S transfer + local, (n, ..., N, N) each, one after another as one (..., N, N).

    Not to be called under autocast: rounded to bf16 a chain of maps is of no use.
    """
    n, *batch, N, _ = transfer.shape
    n_more = (1 << (n - 1).bit_length()) - n  # maps that change nothing, to a power of two
    identity, zeros = torch.eye(N, dtype=transfer.dtype, device=transfer.device), local.new_zeros(())
    transfer = torch.cat((transfer, identity.expand(n_more, *batch, N, N)))
    local = torch.cat((local, zeros.expand(n_more, *batch, N, N)))
    # Those of one chain lie side by side: the pairs of all chains are then one batch of products, without copies.
    transfer, local = (x.movedim(0, -3).reshape(-1, N, N) for x in (transfer, local))
    for _ in range((n - 1).bit_length()):
        local = torch.baddbmm(local[1::2], local[0::2], transfer[1::2])
        transfer = torch.bmm(transfer[0::2], transfer[1::2])
    return transfer.view(*batch, N, N), local.view(*batch, N, N)


def composed_backwards(transfer: Tensor, local: Tensor) -> Tensor:
    """The gradient before some runs of tokens that have `local` of their own, (n, ..., N, N), and none after them."""
    return composed(transfer.mT.flip(0), local.flip(0))[1]


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


class _Enter(torch.autograd.Function):
    """The state before a span. Neither `transfer` nor `local` needs a gradient: the span's own backward has it all."""

    @staticmethod
    def forward(ctx, impl, span, w, k, v, a, b, state):
        ctx.span, ctx.shape = span, w.shape
        initial, *kept = torch.ops.heron.wkv7_enter(w, k, v, a, b, state, impl, *span)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        return initial, *kept

    @staticmethod
    def backward(ctx, d_initial, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        return (*(None,) * 7, None if d_initial is None else of_given(d_initial, *ctx.shape[:2], *ctx.span))


class _Leave(torch.autograd.Function):
    """Hands on y and the final state of a span, whose gradient is that of the spans behind it, too."""

    @staticmethod
    def forward(ctx, impl, span, y, final, own, transfers, *inputs):
        ctx.impl, ctx.span = impl, span
        ctx.save_for_backward(own, transfers, final, *inputs)
        ctx.set_materialize_grads(False)
        return y.view_as(y), final.view_as(final)

    @staticmethod
    def backward(ctx, dy, d_final):  # pyright: ignore[reportIncompatibleMethodOverride]
        own, transfers, final, *inputs = ctx.saved_tensors
        d_y = torch.zeros_like(inputs[0]) if dy is None else dy
        d_final = torch.zeros_like(final) if d_final is None else d_final
        d_final = torch.ops.heron.wkv7_leave(*inputs, d_y, d_final, own, transfers, ctx.impl, *ctx.span)
        return (None, None, dy, d_final, *(None,) * 9)


enter, leave = _Enter.apply, _Leave.apply


@torch.library.custom_op("heron::wkv7_enter", mutates_args=())
def _enter(
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    impl: str,
    chain: str,
    edges: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The states before the span's sequences, and for the backward the transfers: of its own runs, of all spans."""
    with torch.autocast(w.device.type, enabled=False):
        initial, own, _, transfers = _entered(w, k, v, a, b, state, impl, chain, edges)
    return initial, _copied(own) if edges is None else own.new_empty(0), transfers


def _entered(
    w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, impl: str, chain: str, edges: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The states before the span's sequences; of the last one's runs transfer and local; the transfers of all spans."""
    (B, T), mine = w.shape[:2], spans.CHAINS[chain]
    ends = spans.ends(mine, edges, T)
    own, own_local = MAPS[impl](*(x[:, ends.last_begin :] for x in (w, k, v, a, b)))
    transfer, local = composed(own, own_local)
    if not (ends.continues and ends.whole):  # the last sequence begins here, with a state that is known
        local = local + state[ends.last : ends.last + B] @ transfer
        transfer = torch.zeros_like(transfer)
    transfers, locals_ = mine.gather(torch.stack((transfer, local))).unbind(1)
    initial = _copied(state)
    if ends.continues:
        initial[:B] = composed(transfers[: mine.index], locals_[: mine.index])[1]
    return initial, own, own_local, _copied(transfers)


@_enter.register_fake
def _(w, k, v, a, b, state, impl, chain, edges):
    runs = cuda.n_segments(w) if impl == "cuda" else 1
    square = (w.shape[0], *state.shape[1:])
    own = state.new_empty(runs, *square) if edges is None else state.new_empty(0)
    return state.new_empty(state.shape), own, state.new_empty(spans.CHAINS[chain].size, *square)


@torch.library.custom_op("heron::wkv7_leave", mutates_args=())
def _leave(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    dy: Tensor,
    d_final: Tensor,
    own: Tensor,
    transfers: Tensor,
    impl: str,
    chain: str,
    edges: Tensor | None,
) -> Tensor:
    """The gradient of the last states, that of the spans behind included."""
    with torch.autocast(w.device.type, enabled=False):
        return _left((r, w, k, v, a, b, dy), d_final, own, transfers, impl, chain, edges)


def _left(
    inputs: tuple[Tensor, ...],
    d_final: Tensor,
    own: Tensor,
    transfers: Tensor,
    impl: str,
    chain: str,
    edges: Tensor | None,
    local: Tensor | None = None,
) -> Tensor:
    """The gradient of the last states; `local`: what the first sequence's runs add to it, where that is known."""
    (B, T), mine = inputs[0].shape[:2], spans.CHAINS[chain]
    ends, behind = spans.ends(mine, edges, T), slice(mine.index + 1, None)
    handed_back = torch.zeros_like(d_final[:B])
    if ends.continues:
        r, w, k, v, a, b, dy = (x[:, : ends.first_end] for x in inputs)
        if edges is not None:
            own, _ = MAPS[impl](w, k, v, a, b)
        local = GRADIENTS[impl](r, w, a, b, dy) if local is None else local
        handed_back = composed_backwards(own, torch.cat((local[:-1], local[-1:] + d_final[:B] @ own[-1].mT)))
    everyone = mine.gather(handed_back)
    d_final = _copied(d_final)
    if mine.index + 1 < mine.size:
        d_final[ends.last : ends.last + B] += composed_backwards(transfers[behind], everyone[behind])
    return d_final


@_leave.register_fake
def _(r, w, k, v, a, b, dy, d_final, own, transfers, impl, chain, edges):
    return d_final.new_empty(d_final.shape)


@torch.library.custom_op("heron::wkv7_of_given", mutates_args=())
def of_given(d_initial: Tensor, n_rows: int, n_tokens: int, chain: str, edges: Tensor | None) -> Tensor:
    """Of the gradient of a span's first states that of those it was given: none for those that came from another."""
    d_initial = _copied(d_initial)
    if spans.ends(spans.CHAINS[chain], edges, n_tokens).continues:
        d_initial[:n_rows] = 0
    return d_initial


@of_given.register_fake
def _(d_initial, n_rows, n_tokens, chain, edges):
    return d_initial.new_empty(d_initial.shape)


@torch.library.custom_op("heron::wkv7_span_kernels", mutates_args=())
def _kernels(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    chain: str,
    edges: Tensor | None,
    save: bool,
    tensor_cores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``heron::wkv7_kernels`` gives, of a span, and the transfers of all spans.

    Maps of the segments that a long sequence is cut into are found once: for the chain, and for the kernels.
    """
    with torch.autocast(w.device.type, enabled=False):
        initial, own, local, transfers = _entered(w, k, v, a, b, state, "cuda", chain, edges)
    maps = None if edges is not None else (cuda.by_row(own), cuda.by_row(local))
    y, final, saved, _ = cuda.run_forward(r, w, k, v, a, b, initial, cu_seqlens, save, tensor_cores, maps)
    return y, final, saved, own.new_empty(0) if maps is None else maps[0], transfers


@_kernels.register_fake
def _(r, w, k, v, a, b, state, cu_seqlens, chain, edges, save, tensor_cores):
    y, final, saved, _ = cuda.empty_results(r, state, cuda.plan_of(r, cu_seqlens, tensor_cores), save, tensor_cores)
    square, n_own = state.shape[1:], w.shape[0] * cuda.n_segments(w)
    own = state.new_empty(n_own, *square) if edges is None else state.new_empty(0)
    return y, final, saved, own, state.new_empty(spans.CHAINS[chain].size, w.shape[0], *square)


@torch.library.custom_op("heron::wkv7_span_kernels_backward", mutates_args=())
def _kernels_backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    dy: Tensor,
    d_final: Tensor | None,
    saved: Tensor,
    own: Tensor,
    transfers: Tensor,
    cu_seqlens: Tensor | None,
    chain: str,
    edges: Tensor | None,
    n_states: int,
    tensor_cores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``heron::wkv7_kernels_backward`` gives, of a span."""
    inputs = (r, w, k, v, a, b)
    if d_final is None:
        d_final = transfers.new_zeros(n_states, *transfers.shape[2:])
    runs, local = own, None
    with torch.autocast(w.device.type, enabled=False):
        if edges is None:  # every span finds this at the same time, before one waits for another
            runs, local = cuda.by_segment(own, w.shape[0]), cuda.span_gradient_kernels(r, w, a, b, dy)
        d_final = _left((*inputs, dy), d_final, runs, transfers, "cuda", chain, edges, local)
    local = None if local is None else cuda.by_row(local)
    *grads, d_initial = cuda.run_backward(
        *inputs, dy, d_final, saved, own, cu_seqlens, n_states, tensor_cores, local
    )  # fmt: skip
    dr, dw, dk, dv, da, db = grads
    return dr, dw, dk, dv, da, db, of_given(d_initial, *w.shape[:2], chain, edges)


@_kernels_backward.register_fake
def _(r, w, k, v, a, b, dy, d_final, saved, own, transfers, cu_seqlens, chain, edges, n_states, tensor_cores):
    return cuda.empty_gradients(r, n_states)
