"""ROSA on a CUDA device: the very indices and lengths of the PyTorch form."""

from __future__ import annotations

import pytest
import torch

from heron.errors import KernelError
from heron.ops.rosa import cuda, rosa, rosa_choice
from tests.ops.kernels import ARCHITECTURES, check_that_none_spills, needs_nvcc
from tests.ops.test_rosa import mixed_streams

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("alphabet", [2, 3, 16, 1000])
@pytest.mark.parametrize("tokens", [1, 2, 33, 128, 129, 130, 257, 258, 513, 514, 1025, 1026, 3000])
def test_every_length_and_every_border_of_its_forms(tokens, alphabet):
    q, k = mixed_streams(37, tokens, alphabet, seed=tokens)
    for max_match in (None, 1, 7, tokens):
        got = rosa(q.cuda(), k.cuda(), max_match, "cuda")
        for one, other in zip(got, rosa(q, k, max_match, "cpu"), strict=True):
            assert torch.equal(one.cpu(), other)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32])
def test_every_dtype_empty_streams_and_what_is_refused(dtype):
    q, k = mixed_streams(10, 50, 2, seed=1)
    expected = rosa(q, k, impl="dp")
    got = rosa(q.to(dtype).cuda(), k.to(dtype).cuda(), impl="cuda")
    assert all(torch.equal(one.cpu(), other) for one, other in zip(got, expected, strict=True))
    none = torch.zeros(3, 0, dtype=dtype, device="cuda")
    assert [x.shape for x in rosa(none, none, impl="cuda")] == [(3, 0)] * 2
    wide = torch.full((1, 4), 2**31, device="cuda")
    with pytest.raises(KernelError, match=r"symbols of q must be in \[0, 2147483648\)"):
        rosa(wide, wide, impl="cuda")
    with pytest.raises(KernelError, match="at most 65535 symbols, not 65536"):
        rosa(*[torch.zeros(1, 65536, dtype=torch.int32, device="cuda")] * 2, impl="cuda")
    assert rosa_choice(torch.device("cuda")).impl == "cuda"


def test_without_a_device_it_says_what_to_type():
    x = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(KernelError, match='impl="cuda": it needs tensors on a CUDA device, got cpu; use impl="auto"'):
        rosa(x, x, impl="cuda")


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernels_compile_without_spilling(tmp_path, arch):
    arguments = "const int32_t*, const int32_t*, int64_t, int, int, int, uint32_t*"
    forms = [f"match<{m}>({arguments})" for m in (4, 8, 16, 32)]
    part = dict(begin="constexpr int kWarps", end="// q, k: (S, T) int32, contiguous")
    check_that_none_spills(tmp_path, cuda.SOURCE, forms, arch, **part)
