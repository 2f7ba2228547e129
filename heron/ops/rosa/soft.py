"""A soft relative of ROSA, whose gradient stands in for that of the exact match."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from heron.errors import KernelError
from heron.ops import _build, _choice
from heron.ops.rosa import cpu

SOURCE = Path(__file__).parent / "csrc" / "soft.cu"
_BYTES_AT_ONCE = 1 << 28  # of one (S, T, T) tensor of the PyTorch form


def soft_suffix(q_signs: Tensor, k_signs: Tensor, max_match: int | None = None) -> tuple[Tensor, Tensor]:
    """How much each earlier end is preferred when a mismatch makes a match lighter instead of ending it.

    ::

        g(t, u) = exp(-3 / (2 D) sum over d of (1 - q[t, d] k[u, d]))      one symbol against one
        S(t, u) = g(t, u) (1 + S(t-1, u-1))                                a soft length of the match that ends at u < t
        p(t, .) = softmax of (sqrt 2 + 1) (sqrt(1 + S) - 1) - log t over u, and of 0.5 for no match

    With a limit W, S counts products of at most W factors. Source: wjie98/rosa_soft, docs/CONCEPT.md.

    Args:
        q_signs, k_signs: (S, T, D), 1 or -1.

    Returns:
        p: (S, T, T - 1), the weight at t of the value at u + 1; 0 for u >= t.
        p of no match: (S, T).
    """
    n_streams, n_tokens, n_bits = q_signs.shape
    log_g = (torch.einsum("std,sud->stu", q_signs, k_signs) - n_bits) * (3 / (2 * n_bits))
    g = log_g.exp()
    column = torch.arange(n_tokens, device=g.device)
    rows, sums = [g[:, 0]], [log_g[:, 0]]
    for t in range(1, n_tokens):
        row = g[:, t] * (1 + pad(rows[-1][:, :-1], (1, 0)))
        sums.append(log_g[:, t] + pad(sums[-1][:, :-1], (1, 0)))
        if max_match is not None and t >= max_match:  # the product of max_match + 1 factors, which is one too many
            before = pad(sums[t - max_match - 1][:, : -max_match - 1], (max_match + 1, 0)) if t > max_match else 0
            row = row - torch.where(column >= max_match, (sums[t] - before).exp(), 0)
        rows.append(row)
    length = torch.stack(rows, 1)[:, :, :-1]
    logits = (math.sqrt(2) + 1) * ((1 + length).sqrt() - 1) - column.clamp(min=1).log()[:, None]
    logits = logits.masked_fill(column[:-1] >= column[:, None], -math.inf)
    p = torch.cat([logits.new_full((n_streams, n_tokens, 1), 0.5), logits], 2).softmax(2)
    return p[:, :, 1:], p[:, :, 0]


def soft_gradients(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, middle: Tensor, no_match: Tensor, max_match: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the signs (1 or -1) of all bits of what the soft matches are worth together.

    The worth of a stream is the sum over t of ``p(t, u) (middle[t] + slope[t] . signs of v[u + 1])`` over u < t, and of
    ``no_match[t]`` by the weight of no match. In fp32 and with no limit below T it runs in C++ (T^2 memory a thread) or
    CUDA (at most 256 MiB, or T^2 / 16 bytes if that is more), else in PyTorch (T^2 memory a stream).

    Args:
        q, k, v: (S, T) uint8 symbols below 2^D, D at most 8.
        slope: (S, T, D) fp32 or fp64.
        middle, no_match: (S, T).
        max_match: as in :func:`heron.ops.rosa`.

    Returns:
        dq, dk, dv: (S, T, D) each, in the dtype of `slope`.

    Raises:
        KernelError: memory ran out.
    """
    if q.numel() == 0:
        return torch.empty_like(slope), torch.empty_like(slope), torch.empty_like(slope)
    impl = soft_choice(q.device, q.shape[1], max_match, slope.dtype).impl
    if impl == "torch":
        return soft_gradients_torch(q, k, v, slope, middle, no_match, max_match)
    form = soft_gradients_cuda if impl == "cuda" else soft_gradients_cpu
    return form(q, k, v, slope, middle, no_match)


def soft_gradients_torch(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, middle: Tensor, no_match: Tensor, max_match: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`soft_gradients` by automatic differentiation of :func:`soft_suffix`; on any device, in any precision."""
    n_streams, n_tokens, n_bits = slope.shape
    gradients = torch.empty_like(slope), torch.empty_like(slope), torch.empty_like(slope)
    at_once = max(1, _BYTES_AT_ONCE // (slope.element_size() * n_tokens**2))
    for begin in range(0, n_streams, at_once):
        part = slice(begin, begin + at_once)
        bits = [x[part, :, None] >> torch.arange(n_bits, device=x.device) & 1 for x in (q, k, v)]
        signs = [(2 * x.to(slope.dtype) - 1).requires_grad_() for x in bits]
        with torch.enable_grad():
            p, none = soft_suffix(signs[0], signs[1], max_match)
            values = torch.einsum("stu,sud->std", p, signs[2][:, 1:])
            worth = (slope[part] * values).sum() + (middle[part] * p.sum(2) + no_match[part] * none).sum()
            found = torch.autograd.grad(worth, signs)
        for gradient, of_part in zip(gradients, found, strict=True):
            gradient[part] = of_part
    return gradients


def soft_gradients_cpu(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, middle: Tensor, no_match: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`soft_gradients` in C++ (csrc/soft.cpp), in fp32 and without a limit."""
    inputs = [x.contiguous() for x in (q, k, v, slope, middle, no_match)]
    gradients = torch.empty_like(inputs[3]), torch.empty_like(inputs[3]), torch.empty_like(inputs[3])
    pointers = [[x.data_ptr() for x in tensors] for tensors in (inputs, gradients)]
    if cpu.gradient_library().heron_rosa_soft(*pointers[0], *slope.shape, torch.get_num_threads(), *pointers[1]):
        raise KernelError(f"rosa: memory ran out over the soft matches of {q.shape[0]} streams of {q.shape[1]} symbols")
    return gradients


def soft_gradients_cuda(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, middle: Tensor, no_match: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`soft_gradients` in CUDA (csrc/soft.cu), in fp32 and without a limit; the same bits every time.

    Raises:
        KernelError: as :meth:`FORM.require`.
    """
    FORM.require(q.device, False, slope.dtype)
    return torch.ops.heron.rosa_soft_gradients(*(x.contiguous() for x in (q, k, v, slope, middle, no_match)))


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "rosa", "rosa_soft", [SOURCE])


def why_not(device: torch.device, is_limited: bool, dtype: torch.dtype) -> str | None:
    """Why neither C++ nor CUDA takes such streams, as a clause; None where they do."""
    if is_limited:
        return "it counts matches of every length, and max_match is below that of the streams"
    return _choice.why_not_dtype(dtype, (torch.float32,))


CPU_FORM = _choice.NativeForm("rosa", "cpu", cpu.GRADIENTS_FORM.what, why_not, cpu.gradient_library)
FORM = _choice.NativeForm("rosa", "cuda", "ROSA's soft gradients", why_not, library)


def soft_choice(
    device: torch.device, n_tokens: int = 0, max_match: int | None = None, dtype: torch.dtype = torch.float32
) -> _choice.Choice:
    """The form that :func:`soft_gradients` takes for streams of `n_tokens` on `device`."""
    facts = device, max_match is not None and max_match < n_tokens, dtype
    other = _choice.Choice("torch", f"automatic differentiation, row by row; runs on {device.type}")
    other = CPU_FORM.choice("C++, one stream after another", other, *facts)
    return FORM.choice("a block for a stream, tile by tile", other, *facts)
