"""The one rule of choice: which implementation of an op ``impl="auto"`` takes here, and why.

`heron doctor` prints these choices; the ops ask for them at each call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Choice(NamedTuple):
    """An implementation's name and the reason it was taken, as one clause."""

    impl: str
    reason: str


def wkv7(device: torch.device, n_tokens: int) -> Choice:
    """Implementation of :func:`heron.ops.wkv7` for a sequence of `n_tokens` on `device`."""
    if n_tokens == 1:
        return Choice("reference", "one token is one step of the loop")
    return Choice("chunked", f"matrix products over chunks of tokens, in PyTorch; runs on {device.type}")


def linear_cross_entropy() -> Choice:
    """Implementation of :func:`heron.ops.linear_cross_entropy`, whatever the shape and the device."""
    return Choice("chunked", "a bounded number of logits at a time")
