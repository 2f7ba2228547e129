"""Selective copying: some tokens among noise, to be repeated in their order when the noise is over."""

from __future__ import annotations

import numpy as np

from benchmarks.proofs.batch import IGNORED, Batch

VOCAB = 18
NOISE, ASK = 16, 17  # after the ids 0 to 15, which are copied
COPIED = 16


def noisy(length: int, rng: np.random.Generator, n: int) -> Batch:
    """Tokens (n, length + 16): 16 random ids at random places in `length` of noise, then 16 times ASK.

    Targets: the ids, in their order, where it is asked for them.
    """
    ids = rng.integers(NOISE, size=(n, COPIED))
    places = np.sort(np.argsort(rng.random((n, length)), axis=1)[:, :COPIED], axis=1)
    tokens = np.full((n, length + COPIED), NOISE, dtype=np.int64)
    tokens[:, length:] = ASK
    np.put_along_axis(tokens, places, ids, axis=1)
    targets = np.full_like(tokens, IGNORED)
    targets[:, length:] = ids
    return tokens, targets
