"""ROSA as a differentiable layer: bits in, vectors out, and a choice of rules for the gradient of the bits.

Of the exact, discrete forward pass only the output vectors have a gradient in the usual sense. README.md of this folder
has the equations of the rules and what each costs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _graph
from heron.ops.rosa.flips import flip_differences
from heron.ops.rosa.soft import soft_gradients

RULES = ("none", "bitflip", "soft_suffix")
NO_MATCH = ("zero", "bit0")
BITS = (1, 4)
_TAU = 1e-3  # below this size of an input its flip counts no more


def rosa_emb01(
    x: Tensor,
    emb0: Tensor,
    emb1: Tensor,
    *,
    bits: int = 1,
    no_match: str = "zero",
    max_match: int | None = None,
    grad: str = "bitflip",
) -> Tensor:
    """The self form: channels of `x` are streams of bits, and the predicted bit chooses a vector of `emb0`, `emb1`.

    Source: BlinkDL/RWKV-LM, RWKV-v8/251014_rosa_1bit_layer.py and the 4-bit self toy.

    Args:
        x: (B, T, C) floating; a bit is ``x > 0``, so 0 and NaN are bit 0.
        emb0, emb1: (C,), what a predicted 0 and 1 put out.
        bits: 1, each channel a stream of its own; or 4, a stream of 4 adjacent channels, the least significant first.
        no_match: where nothing is predicted, "zero" puts out 0, and "bit0" emb0.
        max_match: as in :func:`heron.ops.rosa`.
        grad: the rule for the gradient of `x`, one of RULES.

    Returns:
        (B, T, C) in the dtype of `emb0`. Gradients to `x`, `emb0`, `emb1`.

    Raises:
        KernelError: shapes that do not fit, or a choice that does not exist.
    """
    return _rosa(x, x, x, emb1, emb0, bits, no_match, max_match, grad)


def rosa_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e: Tensor,
    *,
    bits: int = 1,
    no_match: str = "bit0",
    max_match: int | None = None,
    grad: str = "soft_suffix",
) -> Tensor:
    """The QKV form: the bit of `v` after the match of `q` in `k` gives `e` or `-e`.

    Source: BlinkDL/RWKV-LM, RWKV-v8/251024_rosaQKV_run.py, 260212_rosa1bitLM_L12.py, 260222_rosa4bitLM_L12.py.

    Args:
        q, k, v: (B, T, C) floating; a bit is ``> 0``.
        e: (C,).
        bits, max_match, grad: as in :func:`rosa_emb01`; the rule is for `q` and `k`, while `v` has an exact one.
        no_match: "bit0" puts out -e, "zero" 0.

    Returns:
        (B, T, C) in the dtype of `e`. Gradients to `q`, `k`, `v`, `e`.

    Raises:
        KernelError: shapes that do not fit, or a choice that does not exist.
    """
    return _rosa(q, k, v, e, -e, bits, no_match, max_match, grad)


def _rosa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    high: Tensor,
    low: Tensor,
    bits: int,
    no_match: str,
    max_match: int | None,
    grad: str,
) -> Tensor:
    for name, given, choices in (("bits", bits, BITS), ("no_match", no_match, NO_MATCH), ("grad", grad, RULES)):
        if given not in choices:
            raise KernelError(f"rosa: {name} must be one of {', '.join(map(str, choices))}; got {given!r}")
    if q.dim() != 3 or not q.is_floating_point() or q.shape[2] % bits:
        raise KernelError(f"rosa: inputs must be (B, T, C), floating, C a multiple of {bits} for {bits}-bit streams; "
                          f"got {tuple(q.shape)} {q.dtype}")  # fmt: skip
    for x in (k, v):
        if x.shape != q.shape or x.device != q.device:
            raise KernelError(f"rosa: q, k and v must match, got {tuple(q.shape)} on {q.device} and {tuple(x.shape)} "
                              f"on {x.device}")  # fmt: skip
    for x in (high, low):
        if x.shape != q.shape[2:]:
            raise KernelError(f"rosa: output vectors must be (C,) = ({q.shape[2]},), got {tuple(x.shape)}")
    inputs = (q, k, v, high, low)
    if _graph.in_graph():
        return _operator(*inputs, bits, no_match, max_match, grad, k is q and v is q)
    return _Rosa.apply(*inputs, bits, no_match, max_match, grad)


class _Choices(NamedTuple):
    """How a layer computes, as :func:`rosa_emb01` and :func:`rosa_qkv` take it."""

    bits: int
    no_match: str
    max_match: int | None
    grad: str
    self_form: bool
    """Whether queries, keys and values are one tensor."""

    def unmatched(self, low: Tensor) -> Tensor:
        """What is put out where there is no match, (C,)."""
        return low if self.no_match == "bit0" else torch.zeros_like(low)


class _Rosa(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, high, low, bits, no_match, max_match, grad):
        ctx.choices = _Choices(bits, no_match, max_match, grad, k is q and v is q)
        out, src = _forward(q, k, v, high, low, ctx.choices)
        ctx.save_for_backward(q, k, v, high, low, src)
        return out

    @staticmethod
    def backward(ctx, gy):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, high, low, src = ctx.saved_tensors  # asked for once: a recomputed block gives them once
        return *_backward(gy, q, k, v, high, low, src, ctx.choices), None, None, None, None


def _streams(q: Tensor, k: Tensor, v: Tensor, choices: _Choices) -> tuple[Tensor, Tensor, Tensor]:
    """The symbols of queries, keys and values; in the self form they are one tensor."""
    bits = choices.bits
    queries = to_streams(q, bits)
    if choices.self_form:
        return queries, queries, queries
    return queries, to_streams(k, bits), to_streams(v, bits)


def _forward(q: Tensor, k: Tensor, v: Tensor, high: Tensor, low: Tensor, choices: _Choices) -> tuple[Tensor, Tensor]:
    """The output, and where the matches end, (B * C / bits, T)."""
    from heron.ops.rosa import rosa

    queries, keys, values = _streams(q, k, v, choices)
    src, _ = rosa(queries, keys, choices.max_match)
    matched, ones = _found(src, values, len(q), choices.bits)
    return torch.where(matched, torch.where(ones, high, low), choices.unmatched(low)), src


def _backward(
    gy: Tensor, q: Tensor, k: Tensor, v: Tensor, high: Tensor, low: Tensor, src: Tensor, choices: _Choices
) -> list[Tensor | None]:
    """Gradients of q, k, v, high and low; None for what has none under this rule."""
    bits, no_match, max_match, grad, self_form = choices
    inputs, streams = (q, k, v, high, low), _streams(q, k, v, choices)
    wide = torch.promote_types(gy.dtype, torch.float32)
    q, k, v, high, low, gy = (x.to(wide) for x in (*inputs, gy))
    nothing = choices.unmatched(low)
    matched, ones = _found(src, streams[2], len(q), bits)
    zeros = matched & ~ones if no_match == "zero" else ~(matched & ones)
    d_high, d_low = ((gy * chosen).sum((0, 1)) for chosen in (matched & ones, zeros))
    dq = dk = dv = None
    if grad == "bitflip":
        worth = _worth_of_values(gy, high, low, bits), _per_stream(gy * nothing, bits).sum(2)

        def slopes(x: Tensor, flipped: str) -> Tensor:
            return _per_size(_joined(flip_differences(*streams, *worth, bits, max_match, flipped), x), x)

        dq = slopes(q, "all" if self_form else "q")
        dk = None if self_form else slopes(k, "k")
    elif grad == "soft_suffix":
        half, middle = (high - low) / 2, (high + low) / 2
        by_middle, by_nothing = (_per_stream(gy * x, bits).sum(2) for x in (middle, nothing))
        by_sign = soft_gradients(*streams, _per_stream(gy * half, bits), by_middle, by_nothing, max_match)
        dq, dk, dv = (_joined(d, x) / (1 + x.abs()) ** 2 for d, x in zip(by_sign, (q, k, v), strict=True))
    if not self_form:
        dv = value_gradient(v, gy, high - low, src, bits)
    found = (dq, dk, dv, d_high, d_low)
    return [d if d is None else d.to(x.dtype) for d, x in zip(found, inputs, strict=True)]


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    high: Tensor,
    low: Tensor,
    bits: int,
    no_match: str,
    max_match: int | None,
    grad: str,
    self_form: bool,
) -> Tensor:
    return _forward(q, k, v, high, low, _Choices(bits, no_match, max_match, grad, self_form))[0].contiguous()


def _run_backward(
    gy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    high: Tensor,
    low: Tensor,
    bits: int,
    no_match: str,
    max_match: int | None,
    grad: str,
    self_form: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    choices = _Choices(bits, no_match, max_match, grad, self_form)
    found = _backward(gy, q, k, v, high, low, _forward(q, k, v, high, low, choices)[1], choices)
    dense = (torch.zeros_like(x) if d is None else d for d, x in zip(found, (q, k, v, high, low), strict=True))
    dq, dk, dv, d_high, d_low = (d.clone(memory_format=torch.contiguous_format) for d in dense)
    return dq, dk, dv, d_high, d_low


def _keep_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.choices = inputs[5:]


# A recorded graph has no place for the matches: the backward looks for them again. Operators have flat signatures.
_operator_backward = _graph.Operator(
    "rosa_layer_backward",
    _run_backward,
    lambda gy, q, k, v, high, low, *_: tuple(x.new_empty(x.shape) for x in (q, k, v, high, low)),
)
_operator = _graph.Operator(
    "rosa_layer",
    _run,
    lambda q, k, v, high, *_: high.new_empty(q.shape),
    keep=_keep_for_backward,
    backward=lambda ctx, gy: (*_operator_backward(gy, *ctx.saved_tensors, *ctx.choices), *(None,) * 5),
)


def value_gradient(v: Tensor, gy: Tensor, height: Tensor, src: Tensor, bits: int) -> Tensor:
    """The bit-flip gradient of `v`, exactly, in O(T): its bits move no match.

    ``dv[s] = height * (sum of gy[t] over all t with src[t] + 1 == s) / (2 max(|v[s]|, 1e-3))``

    Args:
        v, gy: (B, T, C).
        height: (C,), the output for a 1 less that for a 0.
        src: (B * C / bits, T), where matches end, -1 for none.

    Returns:
        (B, T, C).
    """
    matched = _per_stream(gy, bits) * (src >= 0)[..., None]
    arrived = torch.zeros_like(matched)
    if matched.is_cuda:  # sorted first, so that sums have an order; scatter_add_ has none there
        arrived.index_put_((torch.arange(len(src), device=src.device)[:, None], src + 1), matched, accumulate=True)
    else:
        arrived.scatter_add_(1, (src + 1)[..., None].expand_as(matched), matched)
    return _per_size(_joined(arrived, v) * height, v)


def to_streams(x: Tensor, bits: int) -> Tensor:
    """(B, T, C) floating to (B * C / bits, T) uint8 symbols: bit b of a symbol is channel b of its group, > 0."""
    ones = _per_stream(x > 0, bits).to(torch.uint8)
    return (ones << torch.arange(bits, device=x.device, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def _per_stream(x: Tensor, bits: int) -> Tensor:
    """(B, T, C) to (B * C / bits, T, bits)."""
    batch, n_tokens, n_channels = x.shape
    return x.reshape(batch, n_tokens, n_channels // bits, bits).transpose(1, 2).reshape(-1, n_tokens, bits)


def _joined(per_stream: Tensor, like: Tensor) -> Tensor:
    """(B * C / bits, T, bits) to the (B, T, C) of `like`."""
    batch, n_tokens, _ = like.shape
    return per_stream.view(batch, -1, *per_stream.shape[1:]).transpose(1, 2).reshape(like.shape)


def _found(src: Tensor, v: Tensor, batch: int, bits: int) -> tuple[Tensor, Tensor]:
    """Whether there was a match, and the bits of the value after it, (B, T, C) bool each."""
    place = torch.arange(bits, device=v.device, dtype=torch.uint8)
    ones = v.gather(1, src + 1)[..., None] >> place & 1
    matched = (src >= 0)[..., None].expand_as(ones)
    matched, ones = (x.view(batch, -1, *x.shape[1:]).transpose(1, 2).flatten(2) for x in (matched, ones != 0))
    return matched, ones


def _worth_of_values(gy: Tensor, high: Tensor, low: Tensor, bits: int) -> Tensor:
    """(B * C / bits, T, 2^bits): what each value that could be put out adds to the loss, to first order."""
    symbol = torch.arange(2**bits, device=gy.device)
    ones = (symbol[:, None] >> torch.arange(bits, device=gy.device) & 1).to(gy.dtype)  # (2^bits, bits)
    return _per_stream(gy * high, bits) @ ones.T + _per_stream(gy * low, bits) @ (1 - ones).T


def _per_size(difference: Tensor, x: Tensor) -> Tensor:
    """The slope of a step of this height from -|x| to |x|."""
    return difference / (2 * x.abs().clamp(min=_TAU))
