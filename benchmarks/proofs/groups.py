"""State tracking: which element is the product of all group elements so far? Asked after every element of a word."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np

from benchmarks.proofs.batch import IGNORED, Batch
from heron.errors import ConfigError


@cache
def product_table(group: str) -> np.ndarray:
    """(G, G) int64: entry [a, b] is the number of "a, then b", for "S5" (G = 120) or "A5" (G = 60).

    Elements are numbered as :func:`itertools.permutations` gives them; of A5 the even ones are counted alone.
    """
    elements = _elements(group)
    number = {element: i for i, element in enumerate(elements)}
    return np.array([[number[tuple(b[i] for i in a)] for b in elements] for a in elements])


@cache
def swaps(group: str) -> np.ndarray:
    """(G,) int64: how many swaps of two things make each element, numbered as in :func:`product_table`."""
    return np.array([len(element) - _cycles(element) for element in _elements(group)])


def words(group: str, length: int, silent: int, rng: np.random.Generator, n: int, at_most: int | None = None) -> Batch:
    """Uniform elements, each followed by `silent` tokens that say nothing, of one id above the elements'.

    Args:
        at_most: only elements that so many swaps make; None: all.

    Returns:
        Tokens (n, length (1 + silent)). Targets of that shape: at the last token of each element, the product of it and
        all before it.
    """
    table = product_table(group)
    tokens = np.full((n, length, 1 + silent), len(table))
    targets = np.full_like(tokens, IGNORED)
    chosen = np.arange(len(table)) if at_most is None else np.flatnonzero(swaps(group) <= at_most)
    elements = tokens[:, :, 0] = rng.choice(chosen, size=(n, length))
    product = targets[:, 0, -1] = elements[:, 0]
    for i in range(1, length):
        product = targets[:, i, -1] = table[product, elements[:, i]]
    return tokens.reshape(n, -1), targets.reshape(n, -1)


def _elements(group: str) -> list[tuple[int, ...]]:
    elements = list(itertools.permutations(range(5)))
    if group == "A5":
        return [element for element in elements if (len(element) - _cycles(element)) % 2 == 0]
    if group != "S5":
        raise ConfigError(f"group: wanted S5 or A5, got {group!r}")
    return elements


def _cycles(permutation: tuple[int, ...]) -> int:
    left, cycles = set(permutation), 0
    while left:
        cycles += 1
        place = min(left)
        while place in left:
            left.remove(place)
            place = permutation[place]
    return cycles
