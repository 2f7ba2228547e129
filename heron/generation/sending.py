"""Numbers that the host sends to a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sent(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`values`, of which torch.tensor makes one, on `device`; the host does not wait for what that still computes."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
