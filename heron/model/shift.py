"""What stands before the projections of each half of a block: the sum with the branch before, a norm, token shift."""

from __future__ import annotations

from torch import Tensor, nn

from heron import ops
from heron.model.plain import is_plain
from heron.ops.shift_mix import shift_mix_reference
from heron.ops.spans import Span, last_before


def normed_and_mixed(
    norm: nn.Module,
    span: Span | None,
    x: Tensor,
    branch: Tensor | None,
    mixes: list[Tensor],
    last: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """:func:`heron.ops.shift_mix` with a norm, which is called where it is not plain.

    A `span` gets the token before it from its neighbour.
    """
    if span is not None:
        latest = x[:, -1] if branch is None else x[:, -1] + branch[:, -1]
        n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        last = last_before(span, norm(latest), last, n_seq)
    if is_plain(norm, nn.LayerNorm):
        return ops.shift_mix(x, branch, norm.weight, norm.bias, mixes, last, cu_seqlens, norm.eps)
    return shift_mix_reference(x, branch, None, None, mixes, last, cu_seqlens, 0.0, norm)
