"""heron.ops.sample_rows: its definition by the sampler of single rows, its kernel by the definition, bit for bit."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from heron.errors import KernelError
from heron.generation import sampling
from heron.generation.sampling import Sampling
from heron.ops import _build, _select, sample_rows
from heron.ops.sample_rows import cuda
from heron.ops.sample_rows.reference import LOG2_E, weights

EMULATOR = Path(__file__).parent / "emulator"
MIXED = (
    Sampling(),
    Sampling(top_p=1.0),
    Sampling(top_p=0.9, temperature=0.7),
    Sampling(top_p=0.3, top_k=5, temperature=2.5),
    Sampling(top_p=1.0, top_k=40, temperature=50.0),
    Sampling(temperature=0),
    Sampling(top_p=0.95, presence_penalty=0.5, frequency_penalty=0.25),
    Sampling(top_p=0.99999, temperature=1e-30),
    Sampling(top_p=1.0, temperature=1e300),
    Sampling(top_k=1, frequency_penalty=2.0),
    Sampling(top_p=0.5, top_k=10**9, presence_penalty=3.0),
)


def settings_of(samplings):
    names = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty")
    return torch.tensor([[getattr(s, name) for name in names] for s in samplings], dtype=torch.float64)


def problem(n, vocab, dtype=torch.float32, seed=0):
    """Rows of many spreads, some with many equal logits, some barred, half of them with occurrences."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.02, 1.0, 4.0, 15.0, 0.0, 300.0])[torch.arange(n) % 6, None]
    logits = spread * torch.randn(n, vocab, generator=generator) + 3
    logits[1::5] = logits[1::5].round()
    logits[2::7, ::3] = -math.inf
    logits[3::11] -= 1e4 * (torch.rand(len(logits[3::11]), vocab, generator=generator) < 0.3)
    counts = (3 * torch.rand(n, vocab, generator=generator)).floor() * torch.rand(n, vocab, generator=generator)
    barred = torch.rand(vocab, generator=generator) < 0.1
    barred[vocab // 2] = False
    logits[:, vocab // 2] = logits[:, vocab // 2].clamp(min=-9.0)
    samplings = [MIXED[i % len(MIXED)] for i in range(n)]
    uniforms = torch.rand(n, generator=generator, dtype=torch.float64)
    uniforms[::17], uniforms[5::17] = 0.0, 1 - 2**-53
    return logits.to(dtype), counts, barred, settings_of(samplings), uniforms


@pytest.fixture(scope="module")
def emulated():
    """sample_rows, computed by the kernel's source on a CPU."""
    flags = ("-O1", "-U_FORTIFY_SOURCE", "-ffp-contract=off")
    depends = [cuda.SOURCE, EMULATOR / "hardware.h"]
    library = _build.load_c_library("sample_rows_emulated", [EMULATOR / "sample_rows.cpp"], flags, depends)
    library.sample_rows_emulated.restype = ctypes.c_char_p

    def draw(logits, counts, barred, settings, uniforms, aligned=True):
        n, vocab = logits.shape
        ids, logprobs = torch.full((n,), -7), torch.full((n,), math.nan)
        here = [None if x is None else ctypes.c_void_p(x.data_ptr()) for x in (counts, barred, settings, uniforms)]
        error = library.sample_rows_emulated(
            int(logits.dtype == torch.bfloat16), ctypes.c_void_p(logits.data_ptr()), ctypes.c_int64(n),
            ctypes.c_int64(logits.stride(0)), *here, vocab, int(aligned),
            ctypes.c_void_p(ids.data_ptr()), ctypes.c_void_p(logprobs.data_ptr()),
        )  # fmt: skip
        assert error is None, error.decode()
        return ids, logprobs

    return draw


def compare(got, want):
    assert torch.equal(got[0].cpu(), want[0].cpu())
    fine = want[0].cpu() >= 0
    torch.testing.assert_close(got[1].cpu()[fine], want[1].cpu()[fine], rtol=1e-5, atol=2e-5)


@pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(("n", "vocab"), [(44, 7), (44, 300), (22, 1000), (11, 9001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_source_on_a_cpu_draws_what_the_definition_draws(emulated, n, vocab, dtype):
    logits, *rest = problem(n, vocab, dtype)
    want = sample_rows(logits, *rest, impl="reference")
    compare(emulated(logits, *rest, aligned=vocab % 8 == 0), want)
