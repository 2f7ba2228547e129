"""ROSA: where the longest suffix of a query stream occurred before in its key stream. README.md derives its forms."""

from __future__ import annotations

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice
from heron.ops.rosa import cpu, cuda
from heron.ops.rosa.dp import rosa_dp, rosa_last
from heron.ops.rosa.inputs import MOST_SYMBOLS, check_max_match, check_pair, check_range, check_window
from heron.ops.rosa.memory import LONGEST_MATCH, TokenIndex, TokenStream, rosa_stream
from heron.ops.rosa.reference import rosa_reference

__all__ = ["TokenIndex", "TokenStream", "rosa", "rosa_choice", "rosa_last"]

_FORMS = {
    "reference": rosa_reference, "dp": rosa_dp, "stream": rosa_stream, "cpu": cpu.rosa_cpu, "cuda": cuda.rosa_cuda
}  # fmt: skip
_WITH_WINDOW = ("reference", "dp", "stream")


def rosa_choice(device: torch.device, n_tokens: int = 0) -> _choice.Choice:
    """The form that "auto" takes for streams of `n_tokens` on `device`."""
    other = _choice.Choice("dp", f"plain PyTorch, quadratic in the length; runs on {device.type}")
    other = cpu.FORM.choice("C++, O(log T) a token on any stream", other, device, n_tokens)
    return cuda.FORM.choice("all diagonals of a stream at once, in registers", other, device, n_tokens)


def rosa(
    q: Tensor, k: Tensor, max_match: int | None = None, impl: str = "auto", window: int | None = None
) -> tuple[Tensor, Tensor]:
    """For each position of each stream, find the longest suffix of q that occurred before in k, where it ended last::

        len(i, j) = max l <= j + 1 such that q[i-s] == k[j-s] for all 0 <= s < l,   0 <= j < i
        length[i] = max over j of min(len(i, j), max_match), and 0 where there is no j
        src[i]    = the largest j that attains it, or -1 where length[i] is 0

    src is the END of the match in k; ROSA hands on the value after it, at ``src + 1 <= i``. Position i depends on q up
    to i and on k up to i - 1. Source: BlinkDL/RWKV-LM, RWKV-v8 (there without a limit).

    Args:
        q, k: (S, T) symbols in [0, 2^31) of a signed integer dtype, uint8 or bool; T may be 0. The S streams never mix.
        max_match: the longest match that counts, at least 1; None: no limit. 1 finds the last place where k is q[i].
        impl: "reference" (the definition, O(T^3)), "dp" (plain PyTorch, O(T) vector work a token), "stream" (one tensor
            with itself, given as q and as k, on the CPU and under a `max_match`: :class:`TokenStream`), "cpu" (C++,
            built at first use, O(log T) a token), "cuda" (built at first use), or "auto": stream where it can be; dp
            with a window; else cpu or cuda where the tensors are, and dp elsewhere and, with one line on stderr, where
            those can't be built.
        window: how far back a match may end, ``i - window <= j``, at least 1; None: anywhere.

    Returns:
        src, length: (S, T) int64 each, on the device of `q`.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together, a symbol out of range (where that can
            mislead: on the CPU, and int64 in "cuda"), a `max_match` or `window` below 1, or an `impl` that does not
            exist or can't run here.
    """
    check_pair(q, k)
    check_max_match(max_match)
    check_window(window)
    if q.device.type == "cpu":
        check_range("q", q, MOST_SYMBOLS)
        check_range("k", k, MOST_SYMBOLS)
    if impl == "auto":
        if q is k and q.device.type == "cpu" and max_match is not None and max_match <= LONGEST_MATCH:
            impl = "stream"
        else:
            impl = rosa_choice(q.device, q.shape[1]).impl if window is None else "dp"
    form = _choice.form_of("rosa", impl, _FORMS)
    if impl in _WITH_WINDOW:
        return form(q, k, max_match, window)
    if window is not None:
        raise KernelError(f'rosa: impl="{impl}" has no window; use impl="auto"')
    return form(q, k, max_match)
