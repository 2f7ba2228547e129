"""Matrices of codes: how near they are to what they stand for."""

from __future__ import annotations

import pytest
import torch

from heron.errors import KernelError
from heron.ops.codes import GROUP, CodedMatrix

of_both = pytest.mark.parametrize("bits", [8, 4])


def random_matrix(rows: int, groups: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, groups * GROUP, generator=torch.Generator().manual_seed(seed))


def in_groups(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.double().unflatten(1, (-1, GROUP))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "part"), [(8, 1 / 250), (4, 1 / 6)])
def test_no_number_moves_by_more_than_a_part_of_the_largest_of_its_group(dtype, bits, part):
    matrix = (random_matrix(300, 3) * torch.logspace(-30, 30, 300).unsqueeze(1)).to(dtype)
    coded = CodedMatrix.of(matrix, bits)
    assert coded.bits == bits
    assert coded.codes.dtype == {8: torch.int8, 4: torch.int16}[bits]
    assert coded.scales.dtype == torch.bfloat16
    assert (tuple(coded.shape), tuple(coded.scales.shape)) == ((300, 3 * GROUP), (300, 3))
    assert coded.codes.nbytes == 300 * 3 * GROUP * bits // 8
    assert bits == 4 or int(coded.codes.min()) >= -127
    error = in_groups(coded.dequantized(torch.float64) - matrix.double()).abs()
    assert (error <= in_groups(matrix).abs().amax(dim=-1, keepdim=True) * part).all()


def test_in_4_bits_a_normal_distribution_moves_by_8_percent_less_than_any_even_steps():
    matrix = random_matrix(256, 16)
    error = in_groups(CodedMatrix.of(matrix, 4).dequantized(torch.float32) - matrix).square().sum(dim=-1)
    assert (error.sum() / matrix.square().sum()).sqrt() < 0.0825
    groups, steps = in_groups(matrix), torch.linspace(1.5, 3.0, 40, dtype=torch.float64) / 8  # of 16 even ones
    even = torch.stack([(groups - (groups / s).round().clamp(-8, 7) * s).square().sum(dim=-1) for s in steps])
    assert error.sum() < 0.9 * even.amin(dim=0).sum()


def test_in_4_bits_each_code_is_of_the_nearest_level_and_each_scale_no_worse_than_the_usual_one():
    matrix = random_matrix(64, 3, seed=2)
    coded = CodedMatrix.of(matrix, 4)
    assert coded.levels is not None
    groups, levels = in_groups(matrix), coded.levels.double()

    def error_of(scales):
        return (groups.unsqueeze(-1) - scales[..., None, None] * levels).abs().amin(dim=-1)

    got = (in_groups(coded.dequantized(torch.float64)) - groups).abs()
    torch.testing.assert_close(got, error_of(coded.scales.double()), rtol=1e-6, atol=1e-9)
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    usual = error_of(largest / levels[-1]).square().sum(dim=-1)
    assert (got.square().sum(dim=-1) <= 1.01 * usual).all()


@of_both
def test_groups_of_zeros_stay_zeros_and_not_a_number_stays_in_its_group(bits):
    matrix = torch.ones(3, 2 * GROUP)
    matrix[0, :GROUP] = 0
    matrix[1, 5], matrix[2, 5] = torch.nan, torch.inf
    got = CodedMatrix.of(matrix, bits).dequantized(torch.float32)
    assert torch.equal(got[0, :GROUP], torch.zeros(GROUP))
    assert got[1, 5].isnan()
    assert not got[2, 5].isfinite()
    assert got[0].isfinite().all()
    assert got[1:, GROUP:].isfinite().all()


@of_both
def test_codes_of_a_matrix_that_is_of_codes_already_are_found_again(bits):
    generator = torch.Generator().manual_seed(1)
    scales = torch.randn(4, 2, generator=generator).abs().bfloat16()
    if bits == 8:
        codes = torch.randint(-127, 128, (4, 2 * GROUP), generator=generator, dtype=torch.int8)
        codes[:, ::GROUP] = 127
        coded = CodedMatrix(codes, scales)
    else:
        words = torch.randint(-(2**15), 2**15, (4, 2 * GROUP // 4), generator=generator).to(torch.int16)
        words[:, :: GROUP // 4] |= 15  # numbers 0 of the groups: the largest level
        coded = CodedMatrix(words, scales, CodedMatrix.of(random_matrix(1, 1), 4).levels)
    again = CodedMatrix.of(coded.dequantized(torch.float32), bits)
    assert all(torch.equal(a, b) for a, b in zip(again, coded, strict=True) if a is not None)


def test_four_codes_of_4_bits_in_a_word_are_of_numbers_16_apart():
    levels = CodedMatrix.of(random_matrix(1, 1), 4).levels
    words = torch.zeros(1, 32, dtype=torch.int16)
    words[0, 16 + 3] = 0x4321
    got = CodedMatrix(words, torch.ones(1, 2).bfloat16(), levels).dequantized(torch.float32)[0] - levels[0]
    assert got.nonzero().flatten().tolist() == [64 + 3, 64 + 19, 64 + 35, 64 + 51]
    assert torch.equal(got[[67, 83, 99, 115]], (levels[1:5].float() - levels[0]))


@of_both
def test_rows_that_are_no_whole_groups_are_refused_in_words(bits):
    with pytest.raises(KernelError, match=f"int{bits}: a row must be a multiple of 64 numbers long, got 100"):
        CodedMatrix.of(torch.zeros(3, 100), bits)
