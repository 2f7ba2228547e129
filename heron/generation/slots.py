"""Where a decoder keeps its sequences, so that a step computes few places for few sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

PATIENCE = 4  # steps for which a smaller one must do before sequences are moved: another may be about to come


class Slots:
    """Which slot of a decoder's states each of its sequences is in. A step computes the first slots, up to a size.

    A new sequence takes the lowest slot that is free. With one size nothing depends on the order: a sequence is in the
    slot of its number, and never moved.

    Args:
        sizes: how many slots a step can compute, ascending; the last is all of them.
    """

    def __init__(self, sizes: Sequence[int]):
        self._sizes = tuple(sizes)
        self._of: dict[int, int] = {}
        self._n_too_large = 0  # steps in a row that were larger than they need have been

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._of

    def __getitem__(self, sequence: int) -> int:
        """The slot of a sequence that has one."""
        return self._of[sequence]

    def take(self, sequence: int) -> int:
        """The slot of a sequence, from now on if it has none."""
        if sequence not in self._of:
            self._of[sequence] = sequence if len(self._sizes) == 1 else self._lowest_free(1)[0]
        return self._of[sequence]

    def free(self, sequence: int) -> None:
        """The sequence, if it has a slot, needs none any more."""
        self._of.pop(sequence, None)

    def size(self, slots: Iterable[int]) -> int:
        """The smallest size of a step that computes all `slots`."""
        return self._at_least(1 + max(slots))

    def moves(self) -> list[tuple[int, int]]:
        """Before each step: from which slot to which a state must be copied, now; such sequences are in the new ones.

        There are some only where all sequences then fit a smaller step, and have done so for `PATIENCE` steps.
        """
        if len(self._sizes) == 1:
            return []
        enough = self._at_least(len(self._of))
        high = [sequence for sequence, slot in self._of.items() if slot >= enough]
        if not high:
            self._n_too_large = 0
            return []
        self._n_too_large += 1
        if self._n_too_large < PATIENCE:
            return []
        self._n_too_large = 0
        targets = dict(zip(high, self._lowest_free(len(high)), strict=True))
        moves = [(self._of[sequence], slot) for sequence, slot in targets.items()]
        self._of |= targets
        return moves

    def _at_least(self, n: int) -> int:
        return next(size for size in self._sizes if size >= n)

    def _lowest_free(self, n: int) -> list[int]:
        taken = set(self._of.values())
        return [slot for slot in range(self._sizes[-1]) if slot not in taken][:n]


def sizes_up_to(n: int) -> list[int]:
    """The powers of two below n, and n."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]
