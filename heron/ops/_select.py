"""The one rule of choice: which implementation of an op ``impl="auto"`` takes here, and why.

`heron doctor` prints these choices; the ops ask for them at each call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from heron.errors import KernelError


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


def rosa(device: torch.device, n_tokens: int = 0) -> Choice:
    """Implementation of :func:`heron.ops.rosa` for streams of `n_tokens` on `device`.

    Says so, once, when the compiled form can't be built.
    """
    from heron.ops.rosa.cuda import LONGEST_STREAM

    if device.type not in ("cpu", "cuda"):
        return Choice("dp", f"plain PyTorch, quadratic in the length; runs on {device.type}")
    if device.type == "cuda" and n_tokens > LONGEST_STREAM:
        return Choice("dp", f"plain PyTorch, quadratic in the length; the CUDA form takes {LONGEST_STREAM} symbols")
    reason = _why_rosa_cannot_be_built(device)
    if reason is not None:
        return Choice("dp", f"plain PyTorch, quadratic in the length; the compiled form can't be built ({reason})")
    if device.type == "cuda":
        return Choice("cuda", "all diagonals of a stream at once, in registers")
    return Choice("cpu", "C++, O(log T) a token on any stream")


def rosa_gradients(device: torch.device) -> Choice:
    """Implementation of the gradient rules of ROSA's bits on `device`. Says so, once, when C++ can't be built."""
    if device.type != "cpu":
        return Choice("torch", f"PyTorch and the operator; runs on {device.type}")
    reason = _why_rosa_gradients_cannot_be_built()
    if reason is not None:
        return Choice("torch", f"PyTorch and the operator; the compiled form can't be built ({reason})")
    return Choice("cpu", "C++, one stream after another")


@functools.cache
def _why_rosa_cannot_be_built(device: torch.device) -> str | None:
    from heron.ops.rosa import cpu, cuda

    if device.type == "cuda":
        return _failure_of(lambda: cuda.library(torch.cuda.get_device_capability(device)), "ROSA")
    return _failure_of(cpu.library, "ROSA")


@functools.cache
def _why_rosa_gradients_cannot_be_built() -> str | None:
    from heron.ops.rosa import cpu

    return _failure_of(cpu.gradient_library, "ROSA's gradients")


def _failure_of(build: Callable[[], object], what: str) -> str | None:
    """Why `build` failed, told on stderr, or None."""
    try:
        build()
    except KernelError as error:
        print(f"heron: going on with the slower form of {what} in PyTorch: {error}", file=sys.stderr)
        return str(error)
    return None
