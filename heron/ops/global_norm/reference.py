"""The norm of many tensors and the verdict over a step in PyTorch: the definitions, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def global_norm_reference(tensors: Sequence[Tensor]) -> Tensor:
    """See :func:`heron.ops.global_norm.global_norm`. All sums are in fp32."""
    norms = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        norms += torch._foreach_norm(alike, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def verdict_reference(loss: Tensor, norm: Tensor, limit: float, clip: float) -> tuple[Tensor, Tensor]:
    """See :func:`heron.ops.global_norm.verdict`."""
    bad = (~(torch.isfinite(loss) & torch.isfinite(norm) & (loss <= limit))).float()
    divisor = ((norm + 1e-6) / clip).clamp(min=1.0) if clip else torch.ones_like(norm)
    return bad, divisor
