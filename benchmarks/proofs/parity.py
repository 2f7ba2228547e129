"""Parity: is the number of ones so far odd? Asked at every position; trained on 64 bits, asked on many more."""

from __future__ import annotations

import numpy as np

from benchmarks.proofs.batch import Batch

VOCAB = 2


def bits(length: int, rng: np.random.Generator, n: int) -> Batch:
    """Tokens (n, length): uniform bits. Targets (n, length): the number of ones up to there, modulo 2."""
    tokens = rng.integers(2, size=(n, length))
    return tokens, np.cumsum(tokens, axis=1) % 2
