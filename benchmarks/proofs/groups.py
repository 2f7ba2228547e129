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
    elements = list(itertools.permutations(range(5)))
    if group == "A5":
        elements = [element for element in elements if _is_even(element)]
    elif group != "S5":
        raise ConfigError(f"group: wanted S5 or A5, got {group!r}")
    number = {element: i for i, element in enumerate(elements)}
    return np.array([[number[tuple(b[i] for i in a)] for b in elements] for a in elements])


def words(group: str, length: int, silent: int, rng: np.random.Generator, n: int) -> Batch:
    """Uniform elements, each followed by `silent` tokens that say nothing, of one id above the elements'.

    Returns:
        Tokens (n, length (1 + silent)). Targets of that shape: at the last token of each element, the product of it and
        all before it.
    """
    table = product_table(group)
    tokens = np.full((n, length, 1 + silent), len(table))
    targets = np.full_like(tokens, IGNORED)
    elements = tokens[:, :, 0] = rng.integers(len(table), size=(n, length))
    product = targets[:, 0, -1] = elements[:, 0]
    for i in range(1, length):
        product = targets[:, i, -1] = table[product, elements[:, i]]
    return tokens.reshape(n, -1), targets.reshape(n, -1)


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0
