"""What the output of ROSA would be worth with a bit of its input flipped: exact finite differences, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops.rosa import cpu

LONGEST_STREAM = 32767
_FLIPPED = ("q", "k", "all")  # as csrc/flips.cpp numbers them
_SYMBOLS_AT_ONCE = 1 << 26  # of the streams that are run again together


def flip_differences(
    q: Tensor, k: Tensor, v: Tensor, gain: Tensor, no_match: Tensor, n_bits: int, max_match: int | None, flipped: str
) -> Tensor:
    """For each bit of each symbol: what all outputs of its stream are worth with that bit 1, less with it 0.

    The worth of a stream is the sum over t of ``gain[t, v[src[t] + 1]]``, or of ``no_match[t]`` where src[t] is -1; all
    other bits keep their values. In C++, T^3 / 6 steps a stream for "k" and "all", far fewer for "q" unless the stream
    is nearly constant; without, T n_bits runs of :func:`heron.ops.rosa`.

    Args:
        q, k, v: (S, T) uint8 symbols below 2^n_bits, n_bits at most 8.
        gain: (S, T, 2^n_bits) floating; the C++ form computes in fp32.
        no_match: (S, T).
        max_match: as in :func:`heron.ops.rosa`.
        flipped: "q", "k", or "all", for the self form, where q, k and v are one stream.

    Returns:
        (S, T, n_bits) in the dtype of `gain`.

    Raises:
        KernelError: memory ran out.
    """
    in_cpp = cpu.gradients_choice(q.device).impl == "cpu" and q.shape[1] <= LONGEST_STREAM and q.numel() > 0
    form = flips_cpu if in_cpp else flips_by_runs
    return form(q, k, v, gain, no_match, n_bits, max_match, flipped)


def flips_by_runs(
    q: Tensor, k: Tensor, v: Tensor, gain: Tensor, no_match: Tensor, n_bits: int, max_match: int | None, flipped: str
) -> Tensor:
    """:func:`flip_differences` as it is defined, by running the operator for each flip; on any device."""
    from heron.ops.rosa import rosa

    n_streams, n_tokens = q.shape
    flips = torch.arange(n_tokens * n_bits, device=q.device)
    difference = gain.new_empty(n_streams, len(flips))

    def worth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(F, S) of streams (F, S, T)."""
        src, _ = rosa(q.flatten(0, 1), k.flatten(0, 1), max_match)
        src = src.view(q.shape)
        gained = gain.expand(len(q), -1, -1, -1).gather(3, v.long().gather(2, src + 1)[..., None]).squeeze(3)
        return torch.where(src < 0, no_match, gained).double().sum(2)

    at_once = max(1, _SYMBOLS_AT_ONCE // max(1, q.numel()))
    for part in range(0, len(flips), at_once):
        flip = flips[part : part + at_once]
        place, mask = (x[:, None, None] for x in (flip // n_bits, 1 << flip % n_bits))
        masks = q.new_zeros(len(flip), 1, n_tokens).scatter_(2, place, mask.to(q.dtype))
        run = [
            x ^ masks if flipped in (name, "all") else x.expand(len(flip), -1, -1)
            for name, x in zip("qkv", (q, k, v), strict=True)
        ]
        difference[:, part : part + at_once] = (worth(*run) - worth(q[None], k[None], v[None])).T.to(gain.dtype)
    bits = (k if flipped == "k" else q)[..., None] >> torch.arange(n_bits, device=q.device) & 1
    return difference.view(n_streams, n_tokens, n_bits) * torch.where(bits == 1, -1, 1)


def flips_cpu(
    q: Tensor, k: Tensor, v: Tensor, gain: Tensor, no_match: Tensor, n_bits: int, max_match: int | None, flipped: str
) -> Tensor:
    """:func:`flip_differences` in C++, for streams of at most 32767 symbols."""
    inputs = [x.contiguous() for x in (q, k, v, gain.float(), no_match.float())]
    difference = torch.empty(*q.shape, n_bits, dtype=torch.float64)
    sizes = (*q.shape, gain.shape[2], n_bits, q.shape[1] if max_match is None else min(max_match, q.shape[1]))
    failed = cpu.gradient_library().heron_rosa_flips(
        *(x.data_ptr() for x in inputs), *sizes, _FLIPPED.index(flipped), torch.get_num_threads(), difference.data_ptr()
    )
    if failed:
        raise KernelError(f"rosa: memory ran out over the flips of {q.shape[0]} streams of {q.shape[1]} symbols")
    return difference.to(gain.dtype)
