"""WKV7 as matrix products over chunks of tokens, forward and backward by hand, in PyTorch. README.md derives it.

In this file and its README alone C is the chunk length. What needs no state is batched over all chunks, sequences and
heads at once; two products a chunk are serial. A tile has the tokens of one chunk as rows; `left` (a, then r), `right`
(b, then k), `uv` (u, then v) and their like stack two tiles, so that one product does the work of four.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from heron.ops import _graph

_DECAY_SCALE = math.exp(-0.5)


def wkv7_chunked(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`heron.ops.wkv7` in chunks. Inputs (B, T, H, N); state (B, H, N_value, N_key), whose dtype computes."""
    inputs = (r, w, k, v, a, b, state)
    if _graph.in_graph():
        return _operator(*inputs)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _Chunked.apply(*inputs)
    y, state, _ = _forward(*inputs)
    return y, state


def span_chunked(w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`heron.ops.wkv7_span` in chunks: the recurrence from the identity without v, and from zero."""
    B, _, H, N = w.shape
    dtype = torch.promote_types(w.dtype, torch.float32)
    identity = torch.eye(N, dtype=dtype, device=w.device).repeat(B, H, 1, 1)
    transfer = _forward(k, w, k, torch.zeros_like(v), a, b, identity)[1]
    return transfer, _forward(k, w, k, v, a, b, torch.zeros_like(identity))[1]


def span_gradient_chunked(r: Tensor, w: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> Tensor:
    """:func:`heron.ops.wkv7_span_gradient` in chunks. It depends on neither keys nor values, nor on the state."""
    B, T, H, N = w.shape
    state = w.new_zeros(B, H, N, N, dtype=torch.promote_types(w.dtype, torch.float32))
    zeros = torch.zeros_like(w)
    saved = _forward(r, w, zeros, zeros, a, b, state)[2]
    d_initial = _backward(dy, None, saved, T, w.dtype, (False,) * 7)[-1]
    assert d_initial is not None
    return d_initial


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        y, state, saved = _forward(*inputs)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.n_tokens, ctx.dtype = y.shape[1], y.dtype
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_state):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _backward(dy, d_state, ctx.saved_tensors, ctx.n_tokens, ctx.dtype, ctx.needs_input_grad)


def run(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`wkv7_chunked`; no gradient flows."""
    return _forward(r, w, k, v, a, b, state)[:2]


def run_backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, dy: Tensor, d_state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of what :func:`run` takes, from those of what it gives."""
    saved = _forward(r, w, k, v, a, b, state)[2]
    grads: tuple[Any, ...] = _backward(dy, d_state, saved, r.shape[1], r.dtype, (True,) * 7)
    dr, dw, dk, dv, da, db, d_initial = grads
    return dr, dw, dk, dv, da, db, d_initial.clone()


# The backward recomputes the forward: its saved tensors depend on the number of chunks, which a graph would then fix.
_operator_backward = _graph.Operator(
    "wkv7_chunked_backward",
    run_backward,
    lambda r, w, k, v, a, b, state, *_: (*(r.new_empty(r.shape) for _ in range(6)), state.new_empty(state.shape)),
)
_operator = _graph.Operator(
    "wkv7_chunked",
    run,
    lambda r, w, k, v, a, b, state: (r.new_empty(r.shape), state.new_empty(state.shape)),
    keep=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    backward=lambda ctx, dy, d_state: _operator_backward(*ctx.saved_tensors, dy, d_state),
)


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """y, the final state, and the tensors that the backward needs."""
    (B, T, H, N), dtype = r.shape, r.dtype
    C = _chunk_length(T, N)
    chunks = -(-T // C)
    tiles = chunks * B * H
    with torch.autocast(r.device.type, enabled=False):
        r, k, v, a, b = (_split(x, C) for x in (r, k, v, a, b))
        w = _split(w, C, fill=-math.inf)  # a decay of exactly 1

        log_decay = torch.sigmoid(w.to(state.dtype), out=state.new_empty(w.shape)).mul_(-_DECAY_SCALE)
        remains = state.new_ones(chunks, B, H, C + 1, N)
        torch.cumsum(log_decay, dim=-2, out=remains[..., 1:, :]).exp_()
        before, after = remains[..., :-1, :], remains[..., 1:, :]
        left, right, uv = state.new_empty(3, chunks, B, H, 2, C, N)
        torch.mul(a, before, out=left[..., 0, :, :])
        torch.mul(r, after, out=left[..., 1, :, :])
        torch.div(b, after, out=right[..., 0, :, :])
        torch.div(k, after, out=right[..., 1, :, :])
        uv[..., 1, :, :] = v
        left, right, uv = (x.view(tiles, 2 * C, N) for x in (left, right, uv))

        m = torch.bmm(left, right.mT).mul_(_causal(C, state))
        eye = torch.eye(C, dtype=state.dtype, device=state.device).expand(tiles, C, C)
        j = torch.linalg.solve_triangular(-m[:, :C, :C], eye, upper=False, unitriangular=True)
        ja = torch.bmm(j, left[:, :C])
        u = torch.bmm(j, torch.bmm(m[:, :C, C:], uv[:, C:]))

        states = state.new_empty(chunks + 1, B * H, N, N)
        states[0] = state.reshape(B * H, N, N)
        end = after[..., -1:, :].reshape(chunks, B * H, 1, N)
        steps = (x.view(chunks, B * H, *x.shape[1:]) for x in (ja, u, uv, right))
        for i, (e, ja_i, u_i, uv_i, right_i) in enumerate(zip(end, *steps, strict=True)):
            uv_i[:, :C] = u_i.baddbmm_(ja_i, states[i].mT)
            torch.baddbmm(states[i], uv_i.mT, right_i, out=states[i + 1]).mul_(e)

        y = torch.bmm(left[:, C:], states[:-1].view(tiles, N, N).mT).baddbmm_(m[:, C:], uv)
        y = _merge(y.view(after.shape), T, dtype)
        state = states[-1].view(B, H, N, N).clone()
        return y, state, (log_decay, remains, left, right, uv, m, j, states)


def _backward(
    dy: Tensor | None,
    d_state: Tensor | None,
    saved: tuple[Tensor, ...],
    T: int,
    dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of (r, w, k, v, a, b, state) from those of y and of the final state, either of which may be None."""
    log_decay, remains, left, right, uv, m, j, states = saved
    chunks, B, H, C, N = shape = log_decay.shape
    tiles = chunks * B * H
    need_r, need_w, need_k, need_v, need_a, need_b, _ = needs
    dr = dw = dk = dv = da = db = None
    with torch.autocast(left.device.type, enabled=False):
        x = left.new_empty(chunks, B, H, 2, C, N)
        x[..., 1, :, :] = 0 if dy is None else _split(dy, C)
        x = x.view(tiles, 2 * C, N)
        jb = torch.bmm(j.mT, right[:, :C])
        xa = torch.bmm(j.mT, torch.bmm(m[:, C:, :C].mT, x[:, C:]))

        before, after = remains[..., :-1, :], remains[..., 1:, :]
        end = after[..., -1:, :].reshape(chunks, B * H, 1, N)
        d_states = torch.empty_like(states)
        d_states[-1] = 0 if d_state is None else d_state.reshape(B * H, N, N)
        decayed = left.new_empty(chunks, B * H, N, N)
        steps = [t.view(chunks, B * H, *t.shape[1:]).unbind() for t in (jb, xa, x, left)]
        for i, (jb_i, xa_i, x_i, left_i) in reversed(list(enumerate(zip(*steps, strict=True)))):
            torch.mul(d_states[i + 1], end[i], out=decayed[i])
            x_i[:, :C] = xa_i.baddbmm_(jb_i, decayed[i].mT)
            torch.baddbmm(decayed[i], x_i.mT, left_i, out=d_states[i])
        decayed = decayed.view(tiles, N, N)

        if need_v:
            dv = torch.bmm(right[:, C:], decayed.mT).baddbmm_(m[:, :, C:].mT, x)
            dv = _merge(dv.view(shape), T, dtype)
        dm = torch.bmm(x, uv.mT).mul_(_causal(C, left))
        d_left = torch.bmm(x, states[:-1].view(tiles, N, N)).baddbmm_(dm, right)
        d_right = torch.bmm(uv, decayed).baddbmm_(dm.mT, left)
        if need_w:
            # The README's dg_t, with h = beta + kappa - rho: D_0 + sum over s <= t of (h - alpha)_s, less h_t.
            h = d_right[:, :C] * right[:, :C]
            h.addcmul_(d_right[:, C:], right[:, C:]).addcmul_(d_left[:, C:], left[:, C:], value=-1)
            dg = torch.addcmul(h, d_left[:, :C], left[:, :C], value=-1)
            dg[:, 0] += torch.linalg.vecdot(states[:-1], d_states[:-1], dim=-2).view(tiles, N)
            dg = dg.cumsum(dim=-2).sub_(h).view(shape)
            dw = _merge(dg, T, dtype, torch.addcmul(log_decay, log_decay, log_decay, value=1 / _DECAY_SCALE))

        d_left, d_right = (t.view(chunks, B, H, 2, C, N) for t in (d_left, d_right))
        if need_a:
            da = _merge(d_left[..., 0, :, :], T, dtype, before)
        if need_r:
            dr = _merge(d_left[..., 1, :, :], T, dtype, after)
        if need_b or need_k:
            inverse = after.reciprocal()
            db = _merge(d_right[..., 0, :, :], T, dtype, inverse)
            dk = _merge(d_right[..., 1, :, :], T, dtype, inverse)
        return dr, dw, dk, dv, da, db, d_states[0].view(B, H, N, N)


def _chunk_length(T: int, N: int) -> int:
    """The fastest one measured on a CPU (README.md), except that a tie at N = 64 goes to fewer saved states."""
    return min(T, 32 if N >= 64 else 16)


def _split(x: Tensor, C: int, fill: float = 0.0) -> Tensor:
    """View (B, T, H, N) as (chunks, B, H, C, N), a last chunk that is short filled up."""
    if short := -x.shape[1] % C:
        x = F.pad(x, (0, 0, 0, 0, 0, short), value=fill)
    return x.unflatten(1, (-1, C)).permute(1, 0, 3, 2, 4)


def _merge(x: Tensor, T: int, dtype: torch.dtype, factor: Tensor | None = None) -> Tensor:
    """(chunks, B, H, C, N), times `factor` where given, as (B, T, H, N) of `dtype`."""
    chunks, B, H, C, N = x.shape
    out = x.new_empty(B, chunks * C, H, N, dtype=dtype)
    if factor is None:
        _split(out, C).copy_(x)
    else:
        torch.mul(x, factor, out=_split(out, C))
    return out[:, :T].contiguous()


def _causal(C: int, like: Tensor) -> Tensor:
    """(2C, 2C) of 0 and 1: row t sees column s < t (a-rows: the old state) or s <= t (r-rows: the new one)."""
    ones = like.new_ones(C, C)
    return torch.cat((ones.tril(-1), ones.tril())).repeat(1, 2)
