"""Matrices in 8 bits: how near they are to what they stand for."""

from __future__ import annotations

import pytest
import torch

from heron.errors import KernelError
from heron.ops.codes import GROUP, CodedMatrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_number_moves_by_more_than_a_250th_of_the_largest_of_its_group(dtype):
    generator = torch.Generator().manual_seed(0)
    matrix = (torch.randn(300, 3 * GROUP, generator=generator) * torch.logspace(-30, 30, 300).unsqueeze(1)).to(dtype)
    eights = CodedMatrix.of(matrix)
    assert eights.codes.dtype == torch.int8
    assert eights.scales.dtype == torch.bfloat16
    assert (tuple(eights.shape), tuple(eights.scales.shape)) == ((300, 3 * GROUP), (300, 3))
    assert int(eights.codes.min()) >= -127
    error = (eights.dequantized(torch.float64) - matrix.double()).abs().unflatten(1, (3, GROUP))
    assert (error <= matrix.double().abs().unflatten(1, (3, GROUP)).amax(dim=-1, keepdim=True) / 250).all()


def test_groups_of_zeros_stay_zeros_and_not_a_number_stays_in_its_group():
    matrix = torch.ones(2, 2 * GROUP)
    matrix[0, :GROUP] = 0
    matrix[1, 5] = torch.nan
    got = CodedMatrix.of(matrix).dequantized(torch.float32)
    assert torch.equal(got[0, :GROUP], torch.zeros(GROUP))
    assert got[1, 5].isnan()
    assert not got[0].isnan().any()
    assert not got[1, GROUP:].isnan().any()


def test_codes_of_a_matrix_that_is_in_8_bits_already_are_found_again():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, (4, 2 * GROUP), generator=generator, dtype=torch.int8)
    codes[:, ::GROUP] = 127
    eights = CodedMatrix(codes, torch.randn(4, 2, generator=generator).abs().bfloat16())
    again = CodedMatrix.of(eights.dequantized(torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(again, eights, strict=True))


def test_rows_that_are_no_whole_groups_are_refused_in_words():
    with pytest.raises(KernelError, match="a row must be a multiple of 64 numbers long, got 100"):
        CodedMatrix.of(torch.zeros(3, 100))
