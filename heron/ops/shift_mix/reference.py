"""The definition of the op, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_mix_reference(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mixes: Sequence[Tensor],
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """See :func:`heron.ops.shift_mix`. `norm` stands in for the layer norm of weight, bias and eps."""
    if branch is not None:
        x = x + branch
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps) if norm is None else norm(x)
    before, new_last = shifted(normed, last, cu_seqlens)
    delta = before - normed
    return x, [torch.addcmul(normed, delta, mix.to(normed.dtype)) for mix in mixes], new_last


def shifted(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The token before each of x (B, T, C), and each sequence's last token.

    Args:
        last: (n_seq, C), what stands before the first token of each sequence; None: zeros.
        cu_seqlens: as in :func:`heron.ops.shift_mix`; None: each row of x is one sequence, n_seq = B.

    Returns:
        (B, T, C), and (n_seq, C) in memory of its own: a view would keep all of x. Both in the dtype of x.
    """
    last = None if last is None else last.to(x.dtype)
    if cu_seqlens is None and last is not None:
        return torch.cat((last[:, None], x), dim=1)[:, :-1], x[:, -1].clone()
    before = F.pad(x, (0, 0, 1, 0))[:, :-1]  # not x[:, :-1]: torch.export would keep T - 1 from being 1
    if cu_seqlens is None:
        return before, x[:, -1].clone()
    begins, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if last is None:
        last = x.new_zeros(begins.shape[0], x.shape[2])
    holds_tokens = (begins < ends)[:, None]
    position = torch.arange(x.shape[1], device=x.device)
    number = torch.bucketize(position, ends, right=True)  # of the sequence of each token
    before = torch.where((position == begins[number])[:, None], last[number], before[0])[None]
    return before, torch.where(holds_tokens, x[0, (ends - 1).clamp(min=0)], last)
