"""ROSA by its definition: every earlier end, every length. Cubic in the length of a stream; the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def rosa_reference(
    q: Tensor, k: Tensor, max_match: int | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`heron.ops.rosa`, on any device."""
    src, length = torch.full_like(q, -1, dtype=torch.int64), torch.zeros_like(q, dtype=torch.int64)
    for i in range(q.shape[1]):
        for j in range(0 if window is None else max(0, i - window), i):  # a match may end here in k
            # (S, j + 1): q[i] == k[j], q[i-1] == k[j-1], ...
            backwards = (q[:, i - j : i + 1] == k[:, : j + 1]).flip(1)
            common = backwards.cumprod(dim=1).sum(dim=1)
            if max_match is not None:
                common = common.clamp(max=max_match)
            better = (common > 0) & (common >= length[:, i])  # of equally long ones, the latest
            src[better, i], length[better, i] = j, common[better]
    return src, length
