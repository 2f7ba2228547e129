"""Matrices in 8 or 4 bits: a code for each number, and a scale for each 64 numbers of a row."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from heron.errors import KernelError

GROUP = 64  # numbers of a row that share a scale
_LARGEST = 127
_AT_ONCE = 2**20  # numbers that are in fp32 while codes are found
# What codes of 4 bits stand for: by Lloyd's algorithm, for groups of a normal distribution and scales as found here.
_LEVELS = (-116, -89, -69, -52, -38, -25, -12, 0, 10, 21, 32, 45, 58, 74, 95, 127)
_ENDS = tuple(end * factor for end in (_LEVELS[0], _LEVELS[-1]) for factor in (1.0, 1.08))
_QUARTER = GROUP // 4


class CodedMatrix(NamedTuple):
    """A matrix (out, in): a number is what its code stands for, times the scale of its group. in = 64, 128, ..."""

    codes: Tensor
    """(out, in), int8, -127 to 127, each standing for itself. In 4 bits (out, in / 4), int16: of each group 16 words,
    the j-th with the codes of the group's numbers j, 16 + j, 32 + j and 48 + j, from its lowest bits up."""
    scales: Tensor
    """(out, in / GROUP), bf16."""
    levels: Tensor | None = None
    """What each code of 4 bits stands for, (16,) int8; None where codes have 8 bits."""

    @classmethod
    def of(cls, matrix: Tensor, bits: int = 8) -> CodedMatrix:
        """The nearest of a floating matrix (out, in), 8.25 or 4.25 bits a number.

        In 8 bits no number moves by more than a 250th of its group's largest. In 4 bits a group has the scale of some
        that errs least, by the sum of squares: of a normal distribution numbers move by 8 % (root of the mean square).

        Raises:
            KernelError: `in` is no multiple of GROUP.
        """
        n_out, n_in = matrix.shape
        if n_in % GROUP:
            raise KernelError(f"int{bits}: a row must be a multiple of {GROUP} numbers long, got {n_in}")
        nearest = {8: _in_8_bits, 4: _in_4_bits}[bits]
        codes, scales = zip(
            *(
                nearest(some.float().unflatten(1, (-1, GROUP)))
                for some in matrix.detach().split(max(1, _AT_ONCE // n_in))
            ),
            strict=True,
        )
        levels = torch.tensor(_LEVELS, dtype=torch.int8, device=matrix.device) if bits == 4 else None
        return cls(torch.cat(codes), torch.cat(scales), levels)

    @property
    def bits(self) -> int:
        """Of a code."""
        return 8 if self.levels is None else 4

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return torch.Size((len(self.codes), self.scales.shape[1] * GROUP))

    @property
    def device(self) -> torch.device:
        """Where all parts are."""
        return self.codes.device

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix (out, in) that this stands for."""
        wide = torch.float32 if dtype == torch.float16 else dtype  # in fp16 small scales would lose bits
        numbers = self.codes.unflatten(1, (-1, GROUP)) if self.levels is None else _of_words(self.codes, self.levels)
        return (numbers * self.scales.to(wide).unsqueeze(-1)).flatten(1).to(dtype)


Matrix = TypeVar("Matrix", Tensor, CodedMatrix)
"""A large matrix, (out, in)."""


def dense(matrix: Tensor | CodedMatrix, dtype: torch.dtype) -> Tensor:
    """`matrix` (out, in) in `dtype`: itself where it is that already."""
    return matrix.dequantized(dtype) if isinstance(matrix, CodedMatrix) else matrix.to(dtype)


def _in_8_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of fp32 groups (rows, groups, GROUP)."""
    scales = (groups.abs().amax(dim=-1) / _LARGEST).bfloat16()
    # The codes are of the rounded scale, so that rounding it costs nothing.
    codes = (groups / scales.float().unsqueeze(-1)).nan_to_num(0.0).round().clamp(-_LARGEST, _LARGEST)
    return codes.to(torch.int8).flatten(1), scales


def _in_4_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, in words, and scales of fp32 groups (rows, groups, GROUP).

    The largest number of a group may stand at either end of the levels or somewhat inside. Of each of these scales the
    codes are found, and of those the scale that errs least; the best is kept.
    """
    levels = torch.tensor(_LEVELS, dtype=torch.float32, device=groups.device)
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    scales, best = torch.zeros_like(largest), torch.full_like(largest, -1.0)
    for end in _ENDS:
        codes = _nearest(groups / (largest / end), levels)
        found = levels.index_select(0, codes.flatten()).view_as(groups)
        along, square = (groups * found).sum(dim=-1, keepdim=True), found.square().sum(dim=-1, keepdim=True)
        explained = along.abs() / square.sqrt()  # the more, the less the error; its square would overflow
        better = (explained > best) | along.isnan()
        scales, best = torch.where(better, along / square.clamp(min=1.0), scales), torch.where(better, explained, best)
    rounded = scales.bfloat16()
    codes = _nearest(groups / rounded.float(), levels).unflatten(-1, (4, _QUARTER))
    first, second, third, fourth = codes.unbind(dim=-2)
    words = (first | second << 4 | third << 8 | fourth << 12).to(torch.int16)
    return words.flatten(1), rounded.squeeze(-1)


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The code of the level that is nearest to each number, int32; of NaN that of 0."""
    between = levels[1:] + levels[:-1]  # twice what lies halfway: a number is beyond it if its double rounded down is
    codes = torch.bucketize(
        torch.arange(-256.0, 256.0, dtype=x.dtype, device=x.device), between, right=True, out_int32=True
    )
    doubled = (2.0 * x).nan_to_num(0.0).floor_().clamp_(-256.0, 255.0)
    return codes.index_select(0, doubled.int().add_(256).flatten()).view_as(x)


def _of_words(words: Tensor, levels: Tensor) -> Tensor:
    """What codes of 4 bits (out, in / 4) stand for, (out, in / GROUP, GROUP) int8."""
    pairs = torch.stack((levels.repeat(16), levels.repeat_interleave(16)), dim=1).view(torch.int16)  # of a byte's codes
    found = pairs.squeeze(1).index_select(0, words.view(torch.uint8).flatten().int()).view(torch.int8)
    quarters = found.view(len(words), -1, _QUARTER, 4).unbind(dim=-1)
    return torch.stack(quarters, dim=2).flatten(2)
