"""ROSA of a stream with itself in plain PyTorch: O(T log T) vector work for each length that occurs twice."""

from __future__ import annotations

import torch
from torch import Tensor


def found_in(
    tokens: Tensor, max_match: int, window: int | None = None, end: int | None = None, n_found: int = 1
) -> tuple[Tensor, Tensor]:
    """See :meth:`heron.ops.rosa.TokenStream.read`, for all T tokens of a stream at once: (T, n_found) int64 each.

    Runs of one length that occur only once are left out when the next length is looked at.
    """
    T = len(tokens)
    src = torch.full((T, n_found), -1, device=tokens.device)
    length = torch.zeros_like(src)
    ends = torch.arange(T, device=tokens.device)  # of the runs that may occur again, equal ones in order
    runs = tokens.new_zeros(T, dtype=torch.int64)  # a number for each of them, the same for equal runs
    for reach in range(min(max_match, T)):
        inside = ends >= reach
        if end is not None and reach > 0:
            inside &= tokens[ends - reach] != end
        ends, runs = ends[inside], runs[inside]
        if not len(ends):
            break
        runs, order = (runs * 2**31 + tokens[ends - reach]).sort(stable=True)
        ends = ends[order]
        again = runs[1:] == runs[:-1]
        before, now = ends[:-1][again], ends[1:][again]
        if window is not None:
            near = now - before <= window
            before, now = before[near], now[near]
        put_first(src, length, tokens, now, before, reach + 1)
        no = again.new_zeros(1)
        several = torch.cat((no, again)) | torch.cat((again, no))
        runs = torch.cat((no, ~again)).cumsum(0)[several]
        ends = ends[several]
    return src, length


def find_last(
    tokens: Tensor, max_match: int, window: int | None = None, end: int | None = None, n_found: int = 1
) -> tuple[Tensor, Tensor]:
    """:func:`found_in` at the last token alone, (1, n_found) each, in O(T) vector work."""
    t = len(tokens) - 1
    oldest = 0 if window is None else max(t - window, 0)
    src, length = tokens.new_full((1, n_found), -1, dtype=torch.int64), tokens.new_zeros(1, n_found, dtype=torch.int64)
    ends = oldest + (tokens[oldest:t] == tokens[t]).nonzero().flatten()
    for reach in range(min(max_match, t)):
        if reach > 0:
            if tokens[t - reach] == end:
                break
            ends = ends[ends >= reach]
            ends = ends[tokens[ends - reach] == tokens[t - reach]]
        if not len(ends):
            break
        put_first(src, length, tokens, tokens.new_zeros(1, dtype=torch.int64), ends[-1:], reach + 1)
    return src, length


def put_first(src: Tensor, length: Tensor, tokens: Tensor, rows: Tensor, ends: Tensor, n: int) -> None:
    """Put matches of `n` tokens that end at `ends` first in `rows` of src and length (T, n_found), in place.

    Another match with the same follower is taken out; if there is none, the last one is.
    """
    old_src, old_length = src[rows], length[rows]
    same = (old_src >= 0) & (tokens[old_src + 1] == tokens[ends + 1].unsqueeze(1))
    moved = ~(same.cumsum(dim=1) > 0)  # up to the one that is taken out, all move by one place
    places = torch.arange(src.shape[1], device=src.device)
    kept = torch.cat((torch.ones_like(moved[:, :1]), moved[:, :-1]), dim=1)  # place p is filled from p - 1
    from_left = torch.where(kept, (places - 1).clamp(min=0), places)
    src[rows], length[rows] = old_src.gather(1, from_left), old_length.gather(1, from_left)
    src[rows, 0], length[rows, 0] = ends, n
