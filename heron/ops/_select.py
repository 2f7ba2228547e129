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

_no_kernels: str | None = None


class Choice(NamedTuple):
    """An implementation's name and the reason it was taken, as one clause."""

    impl: str
    reason: str


def keep_to_pytorch(reason: str) -> None:
    """From here on ``impl="auto"`` takes no CUDA kernel of ours in this process, for `reason`."""
    global _no_kernels
    _no_kernels = reason


def wkv7(device: torch.device, n_tokens: int, dtype: torch.dtype = torch.bfloat16, head_size: int = 64) -> Choice:
    """Implementation of :func:`heron.ops.wkv7` for a sequence of `n_tokens` of `dtype` and `head_size` on `device`.

    Says so, once, when a CUDA device's kernels can't be built.
    """
    why_not = None
    if device.type == "cuda":
        why_not = _no_kernels or _why_no_wkv7_kernels(device, dtype, head_size)
        if why_not is None:
            form = "on tensor cores" if (dtype, head_size) == (torch.bfloat16, 64) else "in fp32 arithmetic"
            return Choice("cuda", f"kernels that run a head's chunks of tokens {form}")
    if n_tokens == 1:
        return Choice("reference", "one token is one step of the loop")
    reason = f"matrix products over chunks of tokens, in PyTorch; runs on {device.type}"
    return Choice("chunked", reason if why_not is None else f"{reason}; no CUDA kernel ({why_not})")


def _why_no_wkv7_kernels(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    from heron.ops.wkv7 import cuda

    return cuda.why_not(device, dtype, head_size) or _why_wkv7_cannot_be_built()


# What torch.compiler.assume_constant_result sets, which would import the whole compiler here.
_why_no_wkv7_kernels._dynamo_marked_constant = True


@functools.cache
def _why_wkv7_cannot_be_built() -> str | None:
    from heron.ops.wkv7 import cuda

    return _failure_of(cuda.build, "WKV7")


def linear_cross_entropy(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Choice:
    """Implementation of :func:`heron.ops.linear_cross_entropy` for hidden states of `dtype` on `device`.

    Says so, once, when a CUDA device's kernel can't be built.
    """
    why_not = None
    if device.type == "cuda" and dtype != torch.float64:
        why_not = _no_kernels or _why_no_loss_kernel(torch.cuda.get_device_capability(device))
        if why_not is None:
            return Choice("cuda", "a bounded number of logits at a time, each read and written once")
    reason = "a bounded number of logits at a time"
    return Choice("chunked", reason if why_not is None else f"{reason}; no CUDA kernel ({why_not})")


@functools.cache
def _why_no_loss_kernel(capability: tuple[int, int]) -> str | None:
    from heron.ops.linear_cross_entropy import cuda

    return _failure_of(lambda: cuda.library(capability), "the loss")


def rosa(device: torch.device, n_tokens: int = 0) -> Choice:
    """Implementation of :func:`heron.ops.rosa` for streams of `n_tokens` on `device`.

    Says so, once, when the compiled form can't be built.
    """
    from heron.ops.rosa.cuda import LONGEST_STREAM

    if device.type not in ("cpu", "cuda"):
        return Choice("dp", f"plain PyTorch, quadratic in the length; runs on {device.type}")
    if device.type == "cuda" and n_tokens > LONGEST_STREAM:
        return Choice("dp", f"plain PyTorch, quadratic in the length; the CUDA form takes {LONGEST_STREAM} symbols")
    reason = _no_kernels if device.type == "cuda" else None
    reason = reason or _why_rosa_cannot_be_built(device)
    if reason is not None:
        return Choice("dp", f"plain PyTorch, quadratic in the length; no compiled form ({reason})")
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


def sample_rows(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Choice:
    """Implementation of :func:`heron.ops.sample_rows` for logits of `dtype` on `device`.

    Says so, once, when a CUDA device's kernel can't be built.
    """
    why_not = None
    if device.type == "cuda" and dtype != torch.float64:
        why_not = _no_kernels or _why_no_sampling_kernel(torch.cuda.get_device_capability(device))
        if why_not is None:
            return Choice("cuda", "a block of threads a row, without sorting")
    reason = f"sorts every row, in PyTorch; runs on {device.type}"
    return Choice("reference", reason if why_not is None else f"{reason}; no CUDA kernel ({why_not})")


@functools.cache
def _why_no_sampling_kernel(capability: tuple[int, int]) -> str | None:
    from heron.ops.sample_rows import cuda

    return _failure_of(lambda: cuda.library(capability), "drawing tokens")


def row_adamw(device: torch.device, dtype: torch.dtype = torch.float32) -> Choice:
    """Implementation of AdamW by rows for tables of `dtype` that train on `device`.

    Says so, once, when the compiled form can't be built.
    """
    why_not = f"it takes fp32, not {dtype}" if dtype != torch.float32 else None
    if device.type == "cuda":
        why_not = why_not or _no_kernels or _why_no_row_kernels(torch.cuda.get_device_capability(device))
        if why_not is None:
            return Choice("cuda", "all layers at once, tables on the device or read by it from the host")
    elif device.type == "cpu":
        why_not = why_not or _why_rows_cannot_be_built()
        if why_not is None:
            return Choice("cpu", "C++, one pass over the rows")
    return Choice("reference", f"plain PyTorch, on the CPU; no compiled form ({why_not or 'for ' + device.type})")


@functools.cache
def _why_no_row_kernels(capability: tuple[int, int]) -> str | None:
    from heron.ops.rows import cuda

    return _failure_of(lambda: cuda.library(capability), "the tables' rows")


@functools.cache
def _why_rows_cannot_be_built() -> str | None:
    from heron.ops.rows import cpu

    return _failure_of(cpu.library, "AdamW by rows")


def _failure_of(build: Callable[[], object], what: str) -> str | None:
    """Why `build` failed, told on stderr, or None."""
    try:
        build()
    except KernelError as error:
        print(f"heron: going on with the slower form of {what} in PyTorch: {error}", file=sys.stderr)
        return str(error)
    return None
