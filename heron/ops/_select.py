"""The one rule of choice: which implementation of an op ``impl="auto"`` takes here, and why.

`heron doctor` prints these choices; the ops ask for them at each call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _graph

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

    Like all of these it says so, once, when kernels for the device can't be built.
    """
    other = Choice("chunked", f"matrix products over chunks of tokens, in PyTorch; runs on {device.type}")
    if n_tokens == 1:
        other = Choice("reference", "one token is one step of the loop")
    form = "on tensor cores" if (dtype, head_size) == (torch.bfloat16, 64) else "in fp32 arithmetic"
    why_not = _why_no_wkv7_kernels(device, dtype, head_size) if _may_have_kernels(device) else None
    return _cuda_or(other, f"kernels that run a head's chunks of tokens {form}", device, why_not)


def _why_no_wkv7_kernels(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    from heron.ops.wkv7 import cuda

    return cuda.why_not(device, dtype, head_size) or _why_not_built(cuda.build, "WKV7")


def shift_mix(device: torch.device, dtype: torch.dtype = torch.bfloat16, channels: int = 768) -> Choice:
    """Implementation of :func:`heron.ops.shift_mix` for (B, T, `channels`) of `dtype` on `device`."""
    other = Choice("reference", f"plain PyTorch; runs on {device.type}")
    why_not = _why_no_shift_kernels(device, dtype, channels) if _may_have_kernels(device) else None
    return _cuda_or(other, "a block of threads a strip of tokens, each number read once", device, why_not)


def _why_no_shift_kernels(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    from heron.ops.shift_mix import cuda

    return cuda.why_not(device, dtype, channels) or _why_not_built_for(
        device, cuda.library, "norm, token shift and mixing"
    )


def head_mix(device: torch.device, dtype: torch.dtype = torch.bfloat16, head_size: int = 64) -> Choice:
    """Implementation of :func:`heron.ops.head_mix` for inputs of `dtype` and `head_size` on `device`."""
    other = Choice("reference", f"plain PyTorch around WKV7; runs on {device.type}")
    why_not = _why_no_head_kernels(device, dtype, head_size) if _may_have_kernels(device) else None
    return _cuda_or(other, "a kernel before that of WKV7 and one after it, each number read once", device, why_not)


def _why_no_head_kernels(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    from heron.ops.head_mix import cuda

    return (
        cuda.why_not(device, dtype, head_size)
        or _why_no_wkv7_kernels(device, dtype, head_size)
        or _why_not_built_for(device, cuda.library, "the heads of the time mix")
    )


# What torch.compiler.assume_constant_result sets, which would import the whole compiler here.
for _asked_while_tracing in (_why_no_wkv7_kernels, _why_no_shift_kernels, _why_no_head_kernels):
    _asked_while_tracing._dynamo_marked_constant = True


def linear_cross_entropy(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Choice:
    """Implementation of :func:`heron.ops.linear_cross_entropy` for hidden states of `dtype` on `device`."""
    from heron.ops.linear_cross_entropy import cuda

    other = Choice("chunked", f"a bounded number of logits at a time; runs on {device.type}")
    why_not = (
        "it does not take fp64" if dtype == torch.float64 else _why_not_built_for(device, cuda.library, "the loss")
    )
    return _cuda_or(other, "a bounded number of logits at a time, each read and written once", device, why_not)


def sample_rows(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Choice:
    """Implementation of :func:`heron.ops.sample_rows` for logits of `dtype` on `device`."""
    from heron.ops.sample_rows import cuda

    other = Choice("reference", f"sorts every row, in PyTorch; runs on {device.type}")
    unfit = "it does not take fp64" if dtype == torch.float64 else None
    why_not = unfit or _why_not_built_for(device, cuda.library, "drawing tokens")
    return _cuda_or(other, "a block of threads a row, without sorting", device, why_not)


def adamw(device: torch.device, dtype: torch.dtype = torch.float32) -> Choice:
    """Implementation of :func:`heron.ops.adamw.adamw_` for weights of `dtype` on `device`."""
    from heron.ops.adamw import cuda

    other = Choice("fused", f"PyTorch's fused AdamW; runs on {device.type}")
    unfit = None if dtype == torch.float32 else f"it takes fp32, not {dtype}"
    why_not = unfit or _why_not_built_for(device, cuda.library, "AdamW")
    return _cuda_or(other, "one pass over gradients, weights, moments and the network's bf16 copies", device, why_not)


def matvec(weights: Sequence[Tensor]) -> Choice:
    """Implementation of :func:`heron.ops.matvec` for products with `weights`, (out, in) each."""
    from heron.ops.matvec import cuda

    device = weights[0].device
    other = Choice("reference", f"an elementwise product and a sum, in PyTorch; runs on {device.type}")
    unfit = next(filter(None, map(cuda.why_not, weights)), None) if _may_have_kernels(device) else None
    why_not = unfit or _why_not_built_for(device, cuda.library, "products with one vector")
    return _cuda_or(other, "a warp for a row of a weight, each read once", device, why_not)


def head_step(device: torch.device, dtype: torch.dtype = torch.bfloat16, head_size: int = 64) -> Choice:
    """Implementation of :func:`heron.ops.head_step` for inputs of `dtype` and `head_size` on `device`."""
    from heron.ops.head_step import cuda

    other = Choice("reference", f"elementwise, in PyTorch; runs on {device.type}")
    why_not = cuda.why_not(dtype, head_size) or _why_not_built_for(device, cuda.library, "the time mix of one token")
    return _cuda_or(other, "a block of threads a head, its state in registers", device, why_not)


def norm_mix(device: torch.device, dtype: torch.dtype = torch.bfloat16, channels: int = 768) -> Choice:
    """Implementation of :func:`heron.ops.norm_mix` for tokens of `dtype` and `channels` on `device`."""
    from heron.ops.norm_mix import cuda

    other = Choice("reference", f"elementwise, in PyTorch; runs on {device.type}")
    why_not = cuda.why_not(dtype, channels) or _why_not_built_for(device, cuda.library, "layer norm and token shift")
    return _cuda_or(other, "a block of threads a token", device, why_not)


def token_step(device: torch.device, dtype: torch.dtype = torch.float32, head_size: int = 64) -> Choice:
    """Implementation of :class:`heron.ops.token_step.TokenStep` for a network of `dtype` on `device`."""
    from heron.ops.token_step import cpu

    why_not = cpu.why_not(device, dtype, head_size) or _why_not_built(cpu.library, "decoding")
    if why_not is None:
        return Choice("cpu", "C++, each weight read once for all sequences")
    return Choice("reference", f"plain PyTorch; no compiled form ({why_not})")


def row_adamw(device: torch.device, dtype: torch.dtype = torch.float32) -> Choice:
    """Implementation of AdamW by rows for tables of `dtype` that train on `device`."""
    from heron.ops.rows import cpu, cuda

    unfit = None if dtype == torch.float32 else f"it takes fp32, not {dtype}"
    if device.type == "cpu":
        why_not = unfit or _why_not_built(cpu.library, "AdamW by rows")
        if why_not is None:
            return Choice("cpu", "C++, one pass over the rows")
        return Choice("reference", f"plain PyTorch, on the CPU; no compiled form ({why_not})")
    other = Choice("reference", "plain PyTorch, on the CPU")
    why_not = unfit or _why_not_built_for(device, cuda.library, "the tables' rows")
    return _cuda_or(other, "all layers at once, tables on the device or read by it from the host", device, why_not)


def copy_rows(device: torch.device) -> Choice:
    """Who brings rows of tables in the host's memory to a model that runs on `device`."""
    from heron.ops.rows import cuda

    other = Choice("host", "the host picks the rows and sends them")
    why_not = _why_not_built_for(device, cuda.library, "the tables' rows")
    return _cuda_or(other, "the device reads them over the bus, in pinned memory", device, why_not)


def rosa(device: torch.device, n_tokens: int = 0) -> Choice:
    """Implementation of :func:`heron.ops.rosa` for streams of `n_tokens` on `device`."""
    from heron.ops.rosa import cpu, cuda

    other = Choice("dp", f"plain PyTorch, quadratic in the length; runs on {device.type}")
    if device.type == "cpu":
        why_not = _why_not_built(cpu.library, "ROSA")
        if why_not is None:
            return Choice("cpu", "C++, O(log T) a token on any stream")
        return Choice("dp", f"plain PyTorch, quadratic in the length; no compiled form ({why_not})")
    unfit = f"it takes {cuda.LONGEST_STREAM} symbols" if n_tokens > cuda.LONGEST_STREAM else None
    why_not = unfit or _why_not_built_for(device, cuda.library, "ROSA")
    return _cuda_or(other, "all diagonals of a stream at once, in registers", device, why_not)


def rosa_gradients(device: torch.device) -> Choice:
    """Implementation of the gradient rules of ROSA's bits on `device`."""
    from heron.ops.rosa import cpu

    if device.type != "cpu":
        return Choice("torch", f"PyTorch and the operator; runs on {device.type}")
    why_not = _why_not_built(cpu.gradient_library, "ROSA's gradients")
    if why_not is not None:
        return Choice("torch", f"PyTorch and the operator; the compiled form can't be built ({why_not})")
    return Choice("cpu", "C++, one stream after another")


def _cuda_or(other: Choice, reason: str, device: torch.device, why_not: str | None) -> Choice:
    """The CUDA form, for `reason`, on a CUDA device that nothing speaks against; elsewhere `other`, with what does."""
    if device.type != "cuda":
        return other
    why_not = _no_kernels or ("torch.func transforms this call" if _graph.in_transform() else None) or why_not
    if why_not is None:
        return Choice("cuda", reason)
    return Choice(other.impl, f"{other.reason}; no CUDA kernel ({why_not})")


def _may_have_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and _no_kernels is None


def _why_not_built_for(device: torch.device, load: Callable[[tuple[int, int]], object], what: str) -> str | None:
    """Why kernels for a CUDA device can't be built, as a clause; None where they are, and on other devices."""
    if not _may_have_kernels(device):
        return None
    return _why_not_built(load, what, torch.cuda.get_device_capability(device))


@functools.cache
def _why_not_built(load: Callable[..., object], what: str, *arguments: object) -> str | None:
    """Why `load` failed, told on stderr, or None."""
    try:
        load(*arguments)
    except KernelError as error:
        print(f"heron: going on with the slower form of {what} in PyTorch: {error}", file=sys.stderr)
        return str(error)
    return None
