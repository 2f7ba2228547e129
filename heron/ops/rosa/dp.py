"""ROSA by dynamic programming in plain PyTorch: O(T) vector work a token over all streams, on any device.

The common suffix of q[..i] and k[..j] is one longer than that of q[..i-1] and k[..j-1], or empty, so it grows along the
diagonals ``distance = i - j``. Kept by distance, the lengths are updated in place and need no shift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops.rosa.inputs import check_max_match, check_pair


def rosa_dp(q: Tensor, k: Tensor, max_match: int | None = None, window: int | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`heron.ops.rosa`. q, k: (S, T) integers; returns src and length, (S, T) int64.

    It holds S x T lengths of :func:`length_dtype` and a copy of k beside its results.
    """
    n_streams, n_tokens = q.shape
    src = torch.full((n_streams, n_tokens), -1, device=q.device)
    length = torch.zeros_like(src)
    lengths = torch.zeros(n_streams, n_tokens, dtype=length_dtype(n_tokens), device=q.device)
    latest_first = k.flip(1)
    for i in range(1, n_tokens):
        so_far = lengths[:, :i]
        advance(so_far, latest_first[:, n_tokens - i :], q[:, i], max_match)
        src[:, i], length[:, i] = longest_then_latest(so_far, window)
    return src, length


def rosa_last(
    q: Tensor, k: Tensor, lengths: Tensor | None = None, max_match: int | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`heron.ops.rosa` at the last token alone, for callers that keep the history themselves: O(T) vector work.

    Args:
        q, k: (S, T) symbols of the whole history, T >= 1.
        lengths: what the call for the first T - 1 tokens returned; None: found from the symbols.
        max_match: as in :func:`heron.ops.rosa`.

    Returns:
        src: (S,) int64.
        lengths: (S, T), int16, or int32 beyond 32768 tokens.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together, no token, or a `max_match` below 1. Symbols are
            not looked at one by one: whoever keeps them has checked them.
    """
    check_pair(q, k)
    check_max_match(max_match)
    last = q.shape[1] - 1
    if last < 0 or (lengths is not None and lengths.shape != (len(q), last)):
        got = None if lengths is None else tuple(lengths.shape)
        raise KernelError(f"rosa: wanted at least 1 token and lengths of one less, got {tuple(q.shape)} and {got}")
    latest_first = k[:, :last].flip(1)
    if lengths is None:
        lengths = lengths_at_end(q[:, :last], latest_first, max_match)
    lengths = torch.nn.functional.pad(lengths.to(length_dtype(last + 1)), (0, 1))
    if last == 0:
        return torch.full(q.shape[:1], -1, device=q.device), lengths
    so_far = lengths[:, :last]
    advance(so_far, latest_first, q[:, last], max_match)
    return longest_then_latest(so_far)[0], lengths


def length_dtype(n_tokens: int) -> torch.dtype:
    """The smallest of int16 and int32 that holds every match length of a stream of `n_tokens`."""
    return torch.int16 if n_tokens <= 2**15 else torch.int32


def advance(lengths: Tensor, latest_first: Tensor, symbol: Tensor, max_match: int | None) -> None:
    """Take the match lengths by distance from q[i-1] to q[i], in place.

    Args:
        lengths: (S, i), column d - 1 holding the length of the match that ends at i - d; the last one is 0 before.
        latest_first: (S, i), k[i-1], ..., k[0].
        symbol: (S,), q[i].
        max_match: as in :func:`heron.ops.rosa`.
    """
    lengths.add_(1).mul_(latest_first == symbol[:, None])
    if max_match is not None and max_match < lengths.shape[1]:
        lengths.clamp_(max=max_match)


def longest_then_latest(lengths: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
    """src and length at i, (S,) int64 each, from the lengths by distance (S, i) with i >= 1."""
    best, column = lengths[:, :window].max(1)  # of equal lengths the first column, the nearest and so the latest end
    src = torch.where(best > 0, lengths.shape[1] - 1 - column, -1)
    return src, best.long()


def lengths_at_end(q: Tensor, latest_first: Tensor, max_match: int | None) -> Tensor:
    """The match lengths by distance at the last token, from the symbols: backwards from the end, all distances at once.

    Args:
        q: (S, T), in order.
        latest_first: (S, T), k[T-1], ..., k[0].
        max_match: as in :func:`heron.ops.rosa`.

    Returns:
        (S, T) of :func:`length_dtype`; the last column, which :func:`advance` will need, is 0.
    """
    n_tokens = q.shape[1]
    lengths = torch.zeros(q.shape, dtype=length_dtype(n_tokens), device=q.device)
    equal = torch.ones_like(latest_first, dtype=torch.bool)
    for s in range(n_tokens - 1 if max_match is None else min(n_tokens - 1, max_match)):
        # k from column s + 1 on: k[j - s] for the ends j = T - 2, ..., s
        equal = equal[:, : n_tokens - 1 - s] & (latest_first[:, s + 1 :] == q[:, n_tokens - 1 - s, None])
        if not equal.any():
            break
        lengths[:, : n_tokens - 1 - s] += equal
    return lengths
