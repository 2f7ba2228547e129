"""Batches of conversations: which share a sample, in which order samples come, and what is learned of them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from heron.data.conversations import Samples
from heron.data.loader import Batches
from heron.data.recalled import Recalled
from heron.data.sampling import SampleOrder, permuted_starts
from heron.errors import counted

_IGNORED = -100

_Part = tuple[Tensor, Tensor, Tensor | None, list[int], list[int]]  # ..., where conversations begin, which they are


class Packs:
    """Samples of `ctx_len` tokens that hold one conversation or several, by their number.

    Conversations are laid into samples once; the samples come in a seeded order that is new in each epoch, as those of
    small data do (:mod:`heron.data.sampling`). What shares a sample does not matter: each conversation is computed as
    if it were alone, and what follows the last one of a sample is never learned.

    Args:
        samples: each at most `ctx_len` + 1 ids.
        seed: of the order.
        packed: whether conversations may share a sample.
        recalled: what ROSA memory recalls at each of ``samples.ids``; None: nothing is wanted of it.
        mix: the second corpus; None: none.
        share: of the samples, the part that comes from `mix`.
        together: how many conversations one behind another always share a sample: 2 of pairs.
    """

    def __init__(
        self,
        samples: Samples,
        ctx_len: int,
        seed: int,
        packed: bool = True,
        recalled: Recalled | None = None,
        mix: Batches | None = None,
        share: Fraction = Fraction(0),
        together: int = 1,
    ) -> None:
        self._samples, self._recalled, self._mix, self._share = samples, recalled, mix, share
        self._ctx_len = ctx_len
        self._together = together
        lengths = (np.diff(samples.offsets) - 1).reshape(-1, together).sum(1)  # as inputs
        order = permuted_starts(len(lengths) + 1, 1, seed, 0)
        laid_out = _laid_out(lengths, order, ctx_len) if packed else [[number] for number in order.tolist()]
        self._packs = [[together * group + i for group in groups for i in range(together)] for groups in laid_out]
        self._most = max(map(len, self._packs))
        self._order = SampleOrder(len(self._packs) + 1, 1, seed, None)

    @property
    def samples_per_epoch(self) -> int:
        """Samples until every conversation was seen once, those of the second corpus included."""
        return math.ceil(len(self._packs) / (1 - self._share))

    @property
    def description(self) -> str:
        """One line for the console."""
        mixed = f", {float(self._share):.3g} of them from the second corpus" if self._share else ""
        sequences, samples = counted(len(self._samples), "sequences"), counted(len(self._packs), "samples")
        return f"{sequences} in {samples}, permuted anew in each epoch{mixed}"

    def batch(self, first: int, count: int, every: int = 1) -> tuple[Tensor | None, ...]:
        """`count` samples of the run, counted from 0: `first`, and each that is `every` behind the one before.

        Returns:
            tokens, targets: (count, T) int64, targets -100 where nothing is learned; what ROSA memory recalls at the
            tokens, (count, T, K, 2) int64, or None; and None. Where conversations share samples all are packed into
            one row, (1, count * T), and the last is cu_seqlens, int64, of a length that `count` alone decides: behind
            the last conversation come empty ones. Where several always share one (`together`), a fifth tensor has the
            number of each among `samples`, (len(cu_seqlens) - 1,) int64, -1 for the empty ones.
        """
        return self._joined([self._sample(number) for number in range(first, first + count * every, every)])

    def each_once(self, count: int) -> Iterator[tuple[Tensor | None, ...]]:
        """Batches of `count` samples with every conversation once, as :meth:`batch` gives them; the last is smaller."""
        for first in range(0, len(self._packs), count):
            yield self._joined([self._pack(pack) for pack in self._packs[first : first + count]])

    def _sample(self, number: int) -> _Part:
        """Tokens, targets (T,), recalled (T, K, 2) or None, and where which conversations begin, of one sample."""
        before, after = (math.floor(n * self._share) for n in (number, number + 1))
        if self._mix is not None and after > before:
            x, y, *found = self._mix.batch(before, 1)
            return x[0], y[0], found[0][0] if found else None, [0], [-1]
        place = int(self._order.starts(number - before, 1)[0])
        return self._pack(self._packs[place])

    def _pack(self, pack: list[int]) -> _Part:
        T, at, starts = self._ctx_len, 0, []
        tokens, targets = torch.zeros(T, dtype=torch.int64), torch.full((T,), _IGNORED)
        n_matches = 0 if self._recalled is None else self._recalled.records.shape[1]
        recalled = torch.zeros(T, n_matches, 2, dtype=torch.int64) if n_matches else None
        for number in pack:
            ids, learned, _ = self._samples[number]
            n = len(ids) - 1
            tokens[at : at + n] = torch.from_numpy(ids[:-1])
            targets[at : at + n] = torch.from_numpy(np.where(learned[1:], ids[1:], _IGNORED))
            if recalled is not None and self._recalled is not None:
                recalled[at : at + n] = self._recalled.at(self._samples.offsets[number : number + 1], n)[0]
            starts.append(at)
            at += n
        return tokens, targets, recalled, starts, pack

    def _joined(self, parts: list[_Part]) -> tuple[Tensor | None, ...]:
        tokens, targets = (torch.stack([part[i] for part in parts]) for i in (0, 1))  # pyright: ignore[reportArgumentType]
        found = [part[2] for part in parts if part[2] is not None]
        recalled = torch.stack(found) if found else None
        if self._most == 1:
            return tokens, targets, recalled, None
        T = self._ctx_len
        starts = [row * T + start for row, part in enumerate(parts) for start in part[3]]
        empty = [len(parts) * T] * (1 + len(parts) * self._most - len(starts))
        in_one_row = (None if part is None else part.flatten(0, 1).unsqueeze(0) for part in (tokens, targets, recalled))
        cu_seqlens = torch.tensor([*starts, *empty])
        if self._together == 1:
            return *in_one_row, cu_seqlens
        numbers = torch.tensor([number for part in parts for number in part[4]])
        return *in_one_row, cu_seqlens, F.pad(numbers, (0, len(cu_seqlens) - 1 - len(numbers)), value=-1)


def _laid_out(lengths: np.ndarray, order: np.ndarray, room: int) -> list[list[int]]:
    """Numbers laid into packs of at most `room` in all: each, in that order, into the fullest in which it fits."""
    packs: list[list[int]] = []
    left: list[tuple[int, int]] = []  # room left and number of each pack, sorted
    for number in order.tolist():
        length = int(lengths[number])
        at = bisect.bisect_left(left, (length, 0))
        if at == len(left):
            packs.append([])
            rest, pack = room, len(packs) - 1
        else:
            rest, pack = left.pop(at)
        packs[pack].append(number)
        if rest > length:
            bisect.insort(left, (rest - length, pack))
    return packs
