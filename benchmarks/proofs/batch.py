"""What every task makes: tokens and targets, of which those that are not asked for are left out of the loss."""

from __future__ import annotations

import numpy as np

Batch = tuple[np.ndarray, np.ndarray]  # tokens and targets, (n, T) int64 each
IGNORED = -100
