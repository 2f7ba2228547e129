"""The products by torch._scaled_mm; their operands by kernels, or in operations that a compiler can fuse."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heron.ops import _choice
from heron.ops.fp8_linear import cuda

MULTIPLE = 16  # which torch._scaled_mm wants both inner sizes of a product to be
_FP8 = torch.float8_e4m3fn
_LARGEST = 256.0  # the largest power of two in e4m3, whose largest number is 1.75 times that
_SMALLEST = 2.0**-54  # rows below it keep its scale, so that the product of two scales is still a normal number
_IN_PYTORCH = _choice.Choice("scaled", "in PyTorch")
_EXPONENT = 0x7F800000  # the bits of an fp32 number that are its power of two


def fp8_linear_scaled(x: Tensor, weight: Tensor, y_in_bf16: bool = False) -> Tensor:
    """See :func:`heron.ops.fp8_linear`."""
    rows = x.reshape(-1, x.shape[-1])
    n = rows.shape[0]
    if n % MULTIPLE:  # tokens are the inner size of the weight's gradient
        rows = F.pad(rows, (0, 0, 0, -n % MULTIPLE))
    y: Any = _Fp8Linear.apply(rows, weight, y_in_bf16)
    return y[:n].view(*x.shape[:-1], weight.shape[0])


class _Fp8Linear(torch.autograd.Function):
    """Of x (n, in) and weight (out, in). README.md has the derivation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y_in_bf16: bool) -> Tensor:
        x8, of_x = quantized(x)
        w8, of_w = quantized(weight)
        ctx.save_for_backward(x8, of_x, w8, of_w)
        return x @ weight.t() if y_in_bf16 else _product(x8, of_x, w8, of_w)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x8, of_x, w8, of_w = ctx.saved_tensors
        d8, of_d = quantized(d_y)
        # What is summed over are rows of the weight, and then tokens. Their scales have to go into the numbers.
        w8, of_w = _turned_with_one_scale(w8, of_w)
        d_x = _product(d8, of_d, w8, of_w)
        x8, of_both = _turned_with_one_scale(x8, of_x * of_d)
        d8 = turned(d8)
        return d_x, _product(d8, torch.ones_like(of_d[:1]).expand(d8.shape[0], 1), x8, of_both), None


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x (n, m), bf16, in e4m3, and their scales (n, 1) fp32, powers of two: x is about the product of both.

    A row with inf or NaN becomes one with NaN.
    """
    if x.shape[1] <= cuda.LARGEST_ROW and _has_kernels(x.device):
        return cuda.rows_cuda(x, _SMALLEST)
    # Longer rows the compiler rounds as fast, together with what stands before them.
    largest = x.abs().amax(dim=1, keepdim=True).float().clamp(min=_SMALLEST)
    # The power of two below 8/7 of the largest: over it, 256 times, the row is at most 1.75 x 256, e4m3's largest.
    power = ((largest * (8 / 7)).view(torch.int32) & _EXPONENT).view(torch.float32)
    scale = power / _LARGEST
    return (x.float() * (1 / scale)).to(_FP8), scale


def turned(x: Tensor, factors: Tensor | None = None) -> Tensor:
    """The transpose (m, n) of x (n, m) in e4m3, in memory too, the rows of x times `factors` (n, 1), if given.

    The units that multiply fp8 read both operands along the inner size.
    """
    if _has_kernels(x.device):
        return cuda.turned_cuda(x, factors)
    if factors is not None:
        x = (x.float() * factors).to(_FP8)
    return x.t().contiguous()


def _turned_with_one_scale(x: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose (m, n) of x (n, m) in e4m3, and its scales (m, 1), which all are the largest of `scales` (n, 1).

    Each row of x is multiplied by its scale over the largest one. These are powers of two, so only numbers that fall
    below e4m3's normal ones are rounded.
    """
    largest = scales.amax()
    return turned(x, scales / largest), largest.expand(x.shape[1], 1)


def _has_kernels(device: torch.device) -> bool:
    return cuda.FORM.choice("kernels", _IN_PYTORCH, device).impl == "cuda"


def _product(a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor) -> Tensor:
    """a b^T in bf16, of a (n, k) and b (m, k) in e4m3, and scales of their rows (n, 1) and (m, 1)."""
    if a.device.type == "cpu":  # where PyTorch 2.11 does not take scales of rows
        return (a.float() @ b.float().t() * of_a * of_b.t()).to(torch.bfloat16)
    scales = {"scale_a": of_a.contiguous(), "scale_b": of_b.t().contiguous()}
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a, b.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True
    )
