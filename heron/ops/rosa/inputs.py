"""What `rosa` and `rosa_last` ask of their callers: KernelErrors that say what was wanted and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from heron.errors import KernelError

SYMBOL_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MOST_SYMBOLS = 2**31


def check_pair(q: Tensor, k: Tensor) -> None:
    """Raise KernelError unless q and k are integers of one shape (S, T) on one device."""
    for name, symbols in (("q", q), ("k", k)):
        if symbols.dim() != 2:
            raise KernelError(f"rosa: {name} must be (S, T), got {tuple(symbols.shape)}")
        if symbols.dtype not in SYMBOL_DTYPES:
            raise KernelError(
                f"rosa: {name} must hold symbols of a signed integer dtype, uint8 or bool, got {symbols.dtype}"
            )
    if k.shape != q.shape or k.device != q.device:
        raise KernelError(
            f"rosa: q and k must match, got {tuple(q.shape)} on {q.device} and {tuple(k.shape)} on {k.device}"
        )


def check_range(name: str, symbols: Tensor, alphabet: int) -> None:
    """Raise KernelError unless all of `symbols`, of any shape, are in [0, alphabet)."""
    if symbols.numel() == 0:
        return
    least, most = (int(extreme) for extreme in symbols.aminmax())
    if least < 0 or most >= alphabet:
        position = ((symbols < 0) | (symbols.long() >= alphabet)).nonzero()[0].tolist()
        found = int(symbols[tuple(position)])
        raise KernelError(f"rosa: symbols of {name} must be in [0, {alphabet}), got {found} at position {position}")


def check_max_match(max_match: int | None) -> None:
    """Raise KernelError unless `max_match` is None or an int of at least 1."""
    if max_match is not None and (type(max_match) is not int or max_match < 1):
        raise KernelError(f"rosa: max_match must be None or an int of at least 1, got {max_match!r}")


def check_window(window: int | None) -> None:
    """Raise KernelError unless `window` is None or an int of at least 1."""
    if window is not None and (type(window) is not int or window < 1):
        raise KernelError(f"rosa: window must be None or an int of at least 1, got {window!r}")
