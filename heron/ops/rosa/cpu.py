"""ROSA in C++ on the CPU (csrc/rosa.cpp): O(T log T) for every stream, threads over streams, built at first use."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _build, _choice
from heron.ops.rosa.dp import rosa_dp

LONGEST_STREAM = 2**28 - 1
_NO_LIMIT = 2**31 - 1
_CSRC = Path(__file__).parent / "csrc"
_SOURCE = _CSRC / "rosa.cpp"
_HEADERS = [_CSRC / "streams.h"]


def rosa_cpu(q: Tensor, k: Tensor, max_match: int | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`heron.ops.rosa`. q, k: (S, T) integers in [0, 2^31) on the CPU; returns src and length, (S, T) int64.

    It runs on ``torch.get_num_threads()`` threads, each of which holds about 90 T bytes for one-bit symbols, 200 T for
    alphabets of 16 and 145 T to 210 T for larger ones.

    Raises:
        KernelError: as :meth:`FORM.require`.
    """
    FORM.require(q.device, q.shape[1])
    return _run(library(), q, k, max_match)


@functools.cache
def library() -> ctypes.CDLL:
    """The library, built when needed and tried on a small problem.

    Raises:
        KernelError: it can't be built here, or what was built gives wrong answers.
    """
    built = _build.load_c_library("rosa", [_SOURCE], depends=_HEADERS)
    pointer, signed = ctypes.c_void_p, ctypes.c_int64
    built.heron_rosa.argtypes = [pointer, pointer, signed, ctypes.c_int32, ctypes.c_int32, signed, pointer, pointer]
    built.heron_rosa.restype = ctypes.c_int
    time = torch.arange(48)
    for n_symbols in (2, 40):
        q, k = (torch.stack([time * step % 7, time * time // step]) % n_symbols for step in (3, 5))
        for max_match in (None, 2):
            if not all(map(torch.equal, _run(built, q, k, max_match), rosa_dp(q, k, max_match))):
                raise KernelError(f"rosa: {_SOURCE.name}, as built here, gives wrong answers; is the compiler sound?")
    return built


def why_not(device: torch.device, n_tokens: int) -> str | None:
    """Why the library does not take streams of `n_tokens`, as a clause; None where it does."""
    if n_tokens > LONGEST_STREAM:
        return f"it takes streams of at most {LONGEST_STREAM} symbols, not {n_tokens}"
    return None


FORM = _choice.NativeForm("rosa", "cpu", "ROSA", why_not, library)


@functools.cache
def gradient_library() -> ctypes.CDLL:
    """The library behind :mod:`heron.ops.rosa.flips` and :mod:`heron.ops.rosa.soft`, built when needed.

    Raises:
        KernelError: it can't be built here.
    """
    sources = [_CSRC / "flips.cpp", _CSRC / "soft.cpp"]
    built = _build.load_c_library("rosa_gradients", sources, ["-fno-math-errno", "-Wno-psabi"], _HEADERS)
    pointer, small, large = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    built.heron_rosa_flips.argtypes = [*[pointer] * 5, large, *[small] * 5, large, pointer]
    built.heron_rosa_soft.argtypes = [*[pointer] * 6, large, small, small, large, *[pointer] * 3]
    for function in (built.heron_rosa_flips, built.heron_rosa_soft):
        function.restype = ctypes.c_int
    return built


GRADIENTS_FORM = _choice.NativeForm("rosa", "cpu", "ROSA's gradients", lambda device: None, gradient_library)


def gradients_choice(device: torch.device) -> _choice.Choice:
    """The form of the gradient rules of ROSA's bits on `device`."""
    other = _choice.Choice("torch", f"PyTorch and the operator; runs on {device.type}")
    return GRADIENTS_FORM.choice("C++, one stream after another", other, device)


def _run(built: ctypes.CDLL, q: Tensor, k: Tensor, max_match: int | None) -> tuple[Tensor, Tensor]:
    src, length = (torch.empty(q.shape, dtype=torch.int64) for _ in range(2))
    if q.numel() == 0:
        return src, length
    q, k = (symbols.to(torch.int32).contiguous() for symbols in (q, k))
    most = _NO_LIMIT if max_match is None else min(max_match, _NO_LIMIT)
    sizes = (*q.shape, most, torch.get_num_threads())
    if built.heron_rosa(q.data_ptr(), k.data_ptr(), *sizes, src.data_ptr(), length.data_ptr()):
        raise KernelError(f"rosa: memory ran out over {q.shape[0]} streams of {q.shape[1]} symbols; use fewer threads")
    return src, length
