"""What tells whether tokens are those of an earlier run."""

from __future__ import annotations

import hashlib

import numpy as np

_END_BYTES = 1 << 20  # of a memory map that go into its fingerprint, from each end


def fingerprint(*parts: np.ndarray | None) -> str:
    """16 hex digits that change when tokens do; of a large memory map they cover the first and last MiB."""
    digest = hashlib.sha256()
    for tokens in parts:
        if tokens is None:
            digest.update(b"none")
            continue
        digest.update(f"{tokens.dtype.str} {len(tokens)} ".encode())
        raw = np.ascontiguousarray(tokens).view(np.uint8)
        if isinstance(tokens, np.memmap) and len(raw) > 2 * _END_BYTES:
            digest.update(raw[:_END_BYTES].data)
            raw = raw[-_END_BYTES:]
        digest.update(raw.data)
    return digest.hexdigest()[:16]
