"""A text that several processes share, each with a span of its tokens: what an operator needs to know of the others.

Operators know no processes. They know a :class:`Chain`: the spans in the order of their tokens, and one way for each to
see what all of them hold. :mod:`heron.context` makes one of a process group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heron.ops import _graph


class Chain(NamedTuple):
    """The spans of a text, as the holder of one of them sees them."""

    index: int  # of the own span
    size: int  # how many there are
    gather: Callable[[Tensor], Tensor]  # (...) of every span, alike in shape -> (size, ...), in the order of the spans


class Span(NamedTuple):
    """The tokens of a call as a span of a longer text. Every holder of a span makes the same calls in the same order.

    Without `edges` each of the B rows of a call is a part of a text of its own, which goes on in the spans after it.
    With `edges`, (4,) int64 on the CPU, B is 1 and the tokens are packed sequences. The numbers say whether the first
    one began in a span before (1, else 0), the token at which it ends, the token at which the last one begins, and
    which one that is, from 0. Empty sequences may come after it.
    """

    chain: str  # its name among CHAINS: operators of PyTorch take strings
    edges: Tensor | None = None


CHAINS: dict[str, Chain] = {}  # by name


class Ends(NamedTuple):
    """Where a span of T tokens meets its neighbours."""

    continues: bool  # whether its first sequence began before it
    first_end: int  # the token at which that one ends, T where it goes on
    last_begin: int  # the token at which the last sequence begins
    last: int = 0  # the number of that one

    @property
    def whole(self) -> bool:
        """Whether one sequence fills the span."""
        return self.last_begin == 0


def ends(chain: Chain, edges: Tensor | None, n_tokens: int) -> Ends:
    """The ends of the chain's own span."""
    if edges is None:
        return Ends(chain.index > 0, n_tokens, 0)
    continues, *others = edges.tolist()
    return Ends(bool(continues), *others)


def last_before(span: Span, latest: Tensor, last: Tensor | None, n_seq: int) -> Tensor:
    """What stands before the first token of each sequence of a span, for token shift.

    Args:
        latest: (B, C), the span's last token, which the next span gets.
        last: (n_seq, C), what stands before the sequences that begin here; None: zeros.
        n_seq: how many sequences the span has; B without packs.

    Returns:
        (n_seq, C), the first B of them from the span before where they began there. Gradients flow to `latest` of the
        span before, and to `last`.
    """
    return _last_before(latest, last, n_seq, *span)


def _run(latest: Tensor, last: Tensor | None, n_seq: int, chain: str, edges: Tensor | None) -> Tensor:
    mine, B = CHAINS[chain], latest.shape[0]
    everyone = mine.gather(latest.contiguous())
    out = latest.new_zeros(n_seq, latest.shape[1]) if last is None else last.to(latest.dtype, copy=True).contiguous()
    if ends(mine, edges, 1).continues:
        out[:B] = everyone[mine.index - 1]
    return out


def _run_backward(d_out: Tensor, n_rows: int, of_last: bool, chain: str, edges: Tensor | None) -> tuple[Tensor, Tensor]:
    mine = CHAINS[chain]
    d_last = d_out.clone(memory_format=torch.contiguous_format)
    handed_back = torch.zeros_like(d_last[:n_rows])
    if ends(mine, edges, 1).continues:
        handed_back = d_last[:n_rows].clone()
        d_last[:n_rows] = 0
    everyone = mine.gather(handed_back)
    is_last = mine.index + 1 == mine.size
    d_latest = torch.zeros_like(handed_back) if is_last else everyone[mine.index + 1].clone()
    return d_latest, d_last if of_last else d_out.new_empty(0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    latest, last, _, ctx.chain, edges = inputs
    ctx.n_rows, ctx.of_last = latest.shape[0], last is not None
    ctx.save_for_backward(edges)


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    (edges,) = ctx.saved_tensors
    d_latest, d_last = _last_before_backward(d_out, ctx.n_rows, ctx.of_last, ctx.chain, edges)
    return d_latest, d_last if ctx.of_last else None, None, None, None


_last_before_backward = _graph.Operator(
    "span_last_before_backward",
    _run_backward,
    lambda d_out, n_rows, of_last, *_: (
        d_out.new_empty(n_rows, d_out.shape[1]),
        d_out.new_empty(d_out.shape if of_last else 0),
    ),
)
_last_before = _graph.Operator(
    "span_last_before",
    _run,
    lambda latest, last, n_seq, *_: latest.new_empty(n_seq, latest.shape[1]),
    keep=_keep,
    backward=_gradients,
)
