"""What a run is asked: of a task that grows, easier samples first, and of these the first answers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from benchmarks.proofs.batch import IGNORED, Batch
from benchmarks.proofs.catalogue import Task

_FIRST = 2  # answers that a lesson begins with
_EASIER = 5  # answers of an easier lesson
_EVERY = 10  # steps
_FASTER = 16  # answers, for each of which one more is asked for at a time
_KNOWN = 1.0  # nats lost on the answers of a step: below that more is asked for
_LOST = 0.3  # nats lost on an answer: above that the other pieces of a sample would teach nothing
_WHOLE = 0.5  # of the steps: from there on every model is asked for all, however far it has come


class Curriculum:
    """The lessons of a run: the easier samples of its task, then the task.

    A lesson begins with two answers. One more is asked for when those before are known, of long samples several. When
    the first five of an easier one are, the next begins.

    Args:
        task: what is learned.
        steps: of the run.

    Attributes:
        whole_from: the number of steps after which all of the task was asked for; None: not yet.
    """

    def __init__(self, task: Task, steps: int):
        self._lessons = [*task.easier, task.batch]
        _, targets = task.batch(np.random.default_rng(0), 1)
        self._n_answers = int((targets != IGNORED).sum())
        self._pieces, self._length, self._steps = task.pieces, task.length, steps
        self._asked, self._looked, self._at_end, self._is_lost = _FIRST, 0, True, False
        self.whole_from = None if task.grows else 0

    def pieces(self, rng: np.random.Generator, n: int) -> Iterator[tuple[bool, Batch]]:
        """Without end, what a step learns of `n` samples, and whether it is their beginning. Samples of which a model
        has lost track are given up."""
        while True:
            tokens, targets = self.batch(rng, n)
            asked = np.flatnonzero((targets != IGNORED).any(axis=0))[-1]
            for begin in range(0, asked + 1, self._length):
                piece = slice(begin, begin + self._length)
                self._at_end = asked < piece.stop
                yield begin == 0, (tokens[:, piece], targets[:, piece])
                if self._is_lost:
                    break

    def batch(self, rng: np.random.Generator, n: int) -> Batch:
        """`n` samples of the lesson, with targets where something is asked for."""
        if self.whole_from is not None:
            return self._lessons[-1](rng, n)
        tokens, targets = self._lessons[0](rng, n)
        return tokens, first_answers(targets, self._asked)

    def after(self, step: int, loss: Tensor) -> None:
        """Look at the `loss` of the last of so many steps: where it is low, and of what is asked for last, ask more."""
        self._is_lost = self._pieces > 1 and float(loss) > _LOST
        if self.whole_from is not None or not self._at_end or step - self._looked < _EVERY:
            return
        self._looked = step
        if step >= _WHOLE * self._steps:
            self.whole_from = step
        elif float(loss) * min(self._asked, self._n_answers // self._pieces) < _KNOWN:
            self._asked += 1 + self._asked // _FASTER
        if len(self._lessons) > 1:
            if self._asked > min(_EASIER, self._n_answers):
                del self._lessons[0]
                self._asked = _FIRST
        elif self._asked >= self._n_answers:
            self.whole_from = step


def first_answers(targets: np.ndarray, n: int) -> np.ndarray:
    """Targets (samples, T) of which nothing is asked behind the first n places where something is."""
    places = np.flatnonzero((targets != IGNORED).any(axis=0))
    return np.where(np.arange(targets.shape[1]) <= places[min(n, len(places)) - 1], targets, IGNORED)
