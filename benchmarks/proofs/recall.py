"""Multi-query associative recall: pairs of keys and values come first, then keys are asked for in any order."""

from __future__ import annotations

import numpy as np

from benchmarks.proofs.batch import IGNORED, Batch

VOCAB = 8192
_POWER = 0.01  # most keys are asked for soon after the pairs, some far behind them


def pairs(length: int, n_pairs: int, rng: np.random.Generator, n: int, vocab: int = VOCAB) -> Batch:
    """Tokens (n, length): `n_pairs` times a key and its value, then each key once among random other tokens.

    Keys are distinct ids below vocab / 2, values distinct ids from there on; what fills the rest is any id. A target is
    the value, where its key is asked for. The queries begin an even number of places behind the pairs, distances drawn
    from a power law: the task of Arora et al. (Zoology, 2023).
    """
    half, context = vocab // 2, 2 * n_pairs
    keys = _distinct(rng, n, half, n_pairs)
    values = half + _distinct(rng, n, half, n_pairs)
    tokens = rng.integers(vocab, size=(n, length))
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values

    slots = np.arange(1, (length - context) // 2 + 1)
    weights = _POWER * slots ** (_POWER - 1)
    # Those with the largest log weight plus Gumbel noise are a draw without replacement.
    noisy = np.log(weights) + rng.gumbel(size=(n, len(slots)))
    chosen = np.argsort(-noisy, axis=1)[:, :n_pairs]
    places = context + 2 * chosen
    targets = np.full_like(tokens, IGNORED)
    np.put_along_axis(tokens, places, keys, axis=1)
    np.put_along_axis(targets, places, values, axis=1)
    return tokens, targets


def _distinct(rng: np.random.Generator, n: int, below: int, count: int) -> np.ndarray:
    """(n, count) ids, distinct in each row: a draw is repeated where it has two of the same."""
    drawn = rng.integers(below, size=(n, count))
    while True:
        ordered = np.sort(drawn, axis=1)
        doubled = (np.diff(ordered, axis=1) == 0).any(axis=1)
        if not doubled.any():
            return drawn
        drawn[doubled] = rng.integers(below, size=(int(doubled.sum()), count))
