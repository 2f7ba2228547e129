"""ROSA on a CUDA device: the very indices and lengths of the PyTorch form."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

from heron.errors import KernelError
from heron.ops import _select
from heron.ops.rosa import cuda, rosa
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
    with pytest.raises(KernelError, match="at most 65535 symbols, got 65536"):
        rosa(*[torch.zeros(1, 65536, dtype=torch.int32, device="cuda")] * 2, impl="cuda")
    assert _select.rosa(torch.device("cuda")).impl == "cuda"


def test_without_a_device_it_says_what_to_type():
    x = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(KernelError, match='impl "cuda" needs tensors on a CUDA device, got cpu; use impl="auto"'):
        rosa(x, x, impl="cuda")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["80", "90"])
def test_the_kernels_compile_without_spilling(tmp_path, arch):
    source = cuda.SOURCE.read_text()
    begin, end = source.index("constexpr int kWarps"), source.index("// q, k: (S, T) int32, contiguous")
    kernels = tmp_path / "kernels.cu"  # without the headers of PyTorch, which may be built without CUDA
    forms = "\n".join(
        f"template __global__ void match<{m}>(const int32_t*, const int32_t*, int64_t, int, int, int, uint32_t*);"
        for m in (4, 8, 16, 32)
    )
    kernels.write_text(f"#include <cstdint>\n{source[begin:end]}\n{forms}\n")
    command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin"]
    command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", str(kernels), "-o", str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("0 bytes spill stores, 0 bytes spill loads") >= 5
