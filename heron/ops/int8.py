"""Matrices in 8 bits: a code for each number, and a scale for each 64 numbers of a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from heron.errors import KernelError

GROUP = 64  # numbers of a row that share a scale
_LARGEST = 127


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
        groups = matrix.detach().float().view(n_out, -1, GROUP)
        # The codes are of the rounded scale, so that rounding it costs nothing.
        scales = (groups.abs().amax(dim=-1) / _LARGEST).bfloat16()
        codes = (groups / scales.float().unsqueeze(-1)).nan_to_num(0.0).round().clamp(-_LARGEST, _LARGEST)
        return cls(codes.to(torch.int8).view(n_out, n_in), scales)

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.codes.shape

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix (out, in) that this stands for."""
        groups = self.codes.unflatten(1, (-1, GROUP)) * self.scales.to(dtype).unsqueeze(-1)
        return groups.flatten(1)
