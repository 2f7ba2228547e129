"""Matrices in 8 bits: a code for each number, and a scale for each 64 numbers of a row."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from heron.errors import KernelError

GROUP = 64  # numbers of a row that share a scale
_LARGEST = 127
_AT_ONCE = 2**24  # numbers that are in fp32 while codes are found


class Int8Matrix(NamedTuple):
    """A matrix (out, in): a number is its code times the scale of its group. 8.25 bits for each."""

    codes: Tensor
    """(out, in), int8, -127 to 127."""
    scales: Tensor
    """(out, in / GROUP), bf16."""

    @classmethod
    def of(cls, matrix: Tensor) -> Int8Matrix:
        """The nearest of a floating matrix (out, in): no number moves by more than a 250th of its group's largest.

        Raises:
            KernelError: `in` is no multiple of GROUP.
        """
        n_out, n_in = matrix.shape
        if n_in % GROUP:
            raise KernelError(f"int8: a row must be a multiple of {GROUP} numbers long, got {n_in}")
        codes = torch.empty(n_out, n_in, dtype=torch.int8, device=matrix.device)
        scales = torch.empty(n_out, n_in // GROUP, dtype=torch.bfloat16, device=matrix.device)
        rows = max(1, _AT_ONCE // n_in)
        for some, codes_of, scales_of in zip(
            matrix.detach().split(rows), codes.split(rows), scales.split(rows), strict=True
        ):
            groups = some.float().unflatten(1, (-1, GROUP))
            # The codes are of the rounded scale, so that rounding it costs nothing.
            scales_of.copy_(groups.abs().amax(dim=-1) / _LARGEST)
            found = (groups / scales_of.float().unsqueeze(-1)).nan_to_num(0.0).round().clamp(-_LARGEST, _LARGEST)
            codes_of.copy_(found.flatten(1))
        return cls(codes, scales)

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where both parts are."""
        return self.codes.device

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix (out, in) that this stands for."""
        wide = torch.float32 if dtype == torch.float16 else dtype  # in fp16 small scales would lose bits
        groups = self.codes.unflatten(1, (-1, GROUP)) * self.scales.to(wide).unsqueeze(-1)
        return groups.flatten(1).to(dtype)


Matrix = TypeVar("Matrix", Tensor, Int8Matrix)
"""A large matrix, (out, in)."""


def dense(matrix: Tensor | Int8Matrix, dtype: torch.dtype) -> Tensor:
    """`matrix` (out, in) in `dtype`: itself where it is that already."""
    return matrix.dequantized(dtype) if isinstance(matrix, Int8Matrix) else matrix.to(dtype)
