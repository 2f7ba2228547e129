"""What counting gives: the entropy of ids under their frequencies, and under an interpolated trigram."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

Row = dict[str, list[int]]  # of train.jsonl
_HELD_BACK = 10  # one row in so many decides how much each order counts
_ROUNDS = 20  # of expectation maximization
_SURPRISE = 0.001  # of the weights is fixed, so that no id is impossible


class Entropies(NamedTuple):
    """Nats an id."""

    unigram: float
    trigram: float


def entropies(train: Sequence[Row], held_out: Sequence[Row], vocab_size: int) -> Entropies:
    """Of the learned ids of `held_out`, under counts of all ids of `train`."""
    most = _Counts(row["ids"] for number, row in enumerate(train) if number % _HELD_BACK)
    back = [most.chances(three, vocab_size) for row in train[::_HELD_BACK] for three in _threes(row)]
    weights = [1 / 4] * 4
    for _ in range(_ROUNDS):
        shares = [0.0] * 4
        for chances in back:
            whole = _mixed(chances, weights)
            shares = [share + w * p / whole for share, w, p in zip(shares, weights, chances, strict=True)]
        weights = [_SURPRISE / 4 + (1 - _SURPRISE) * share / len(back) for share in shares]
    counts = _Counts(row["ids"] for row in train)
    found = [counts.chances(three, vocab_size) for row in held_out for three in _threes(row)]
    of_each = ((_SURPRISE, 1 - _SURPRISE, 0, 0), weights)
    return Entropies(*(-sum(math.log(_mixed(p, w)) for p in found) / len(found) for w in of_each))


def _mixed(chances: Sequence[float], weights: Sequence[float]) -> float:
    return sum(w * p for w, p in zip(weights, chances, strict=True))


class _Counts:
    """How often runs of one, two and three ids stand in rows."""

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        self._of: Counter[tuple[int, ...]] = Counter()
        self._before: Counter[tuple[int, ...]] = Counter()  # how often something follows
        for ids in rows:
            padded = [-1, -1, *ids]
            for at in range(2, len(padded)):
                for n in (1, 2, 3):
                    run = tuple(padded[at - n + 1 : at + 1])
                    self._of[run] += 1
                    self._before[run[:-1]] += 1

    def chances(self, three: tuple[int, ...], vocab_size: int) -> list[float]:
        """Of the last id: at random, and by its last zero, one and two predecessors; 0 where these are new."""
        runs = (three[2:], three[1:], three)
        return [1 / vocab_size, *(self._of[run] / max(self._before[run[:-1]], 1) for run in runs)]


def _threes(row: Row) -> Iterator[tuple[int, ...]]:
    """Each learned id behind the two before it."""
    padded = [-1, -1, *row["ids"]]
    return (tuple(padded[at : at + 3]) for at, learned in enumerate(row["learned"]) if learned and at)
