"""Digit reversal: numbers of 1 to 60 digits, each followed by itself backwards."""

from __future__ import annotations

import numpy as np

from benchmarks.proofs.batch import IGNORED, Batch

VOCAB = 12
COMMA, END = 10, 11  # after the digits 0 to 9
LONGEST = 60
LENGTH = 2 * LONGEST + 2  # the longest number, a comma, its reverse, an end


def numbers(rng: np.random.Generator, n: int, first_only: bool = False) -> Batch:
    """Tokens (n, 121): ``123,321#123...`` until a row is full; sizes are uniform from 1 to 60 digits.

    Targets: the reversed digits and the end behind them, of every number or of the first in each row.
    """
    sizes = rng.integers(1, LONGEST + 1, size=(n, LENGTH // 4 + 1))  # of more numbers than fit
    ends = np.cumsum(2 * sizes + 2, axis=1)
    places = np.arange(LENGTH)
    is_end = np.zeros((n, LENGTH + 1), dtype=np.int64)  # the last column: of numbers that begin behind the row
    np.put_along_axis(is_end, np.minimum(ends, LENGTH), 1, axis=1)
    which = np.cumsum(is_end[:, :LENGTH], axis=1)  # the number that each place belongs to
    size = np.take_along_axis(sizes, which, axis=1)
    begin = np.take_along_axis(ends, which, axis=1) - 2 * size - 2
    behind = places - begin  # how far each place is into its number
    tokens = rng.integers(10, size=(n, LENGTH))
    mirrored = np.take_along_axis(tokens, np.clip(begin + 2 * size - behind, 0, LENGTH - 1), axis=1)
    tokens = np.where(behind > size, mirrored, tokens)
    tokens[behind == size] = COMMA
    tokens[behind == 2 * size + 1] = END
    asked = (behind > size) & (which == 0) if first_only else behind > size
    return tokens[:, :-1], np.where(asked, tokens, IGNORED)[:, 1:]
