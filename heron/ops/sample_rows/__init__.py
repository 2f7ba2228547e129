"""The next token of many rows of logits at once, drawn where the logits are. README.md says how."""

from __future__ import annotations

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice
from heron.ops.sample_rows import cuda
from heron.ops.sample_rows.reference import sample_rows_reference

LARGEST_VOCABULARY = 2**20
_FORMS = {"reference": sample_rows_reference, "cuda": cuda.sample_rows_cuda}


def sample_rows_choice(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> _choice.Choice:
    """The form that "auto" takes for logits of `dtype` on `device`."""
    other = _choice.Choice("reference", f"sorts every row, in PyTorch; runs on {device.type}")
    return cuda.FORM.choice("a block of threads a row, without sorting", other, device, dtype)


def sample_rows(
    logits: Tensor, counts: Tensor | None, barred: Tensor, settings: Tensor, uniforms: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Draw one token from each row.

    The order is that of :func:`heron.generation.sample`: penalties and bars, the cut by top_p and top_k on the
    probabilities as they are, temperature, one draw; among equal probabilities the lower id goes first. What is drawn
    is the first id at which the kept probabilities, summed in the order of ids, exceed the row's uniform number. The
    sums are of 42-bit integers, so exact: every form gives the same ids, bit for bit, whatever the other rows hold.

    Args:
        logits: (n, V) floating, V from 1 to 2^20, the last stride 1. -inf bars a token in its row.
        counts: (n, V) fp32 contiguous, decayed occurrences of each token; None: none. Read where a row has penalties.
        barred: (V,) bool, ids that are never drawn; they count for `logprobs` only.
        settings: (n, 5) fp64, of each row temperature, top_p, top_k, presence_penalty, frequency_penalty in the ranges
            of :class:`heron.generation.Sampling`. Temperature 0, top_p 0 or top_k 1 takes the likeliest token.
        uniforms: (n,) fp64 in [0, 1); not looked at where a row takes the likeliest.
        impl: "reference" (sorts, any device), "cuda" (a kernel, built at first use), or "auto": "cuda" where it runs.

    Returns:
        ids (n,) int64, -1 for a row whose largest logit is NaN or infinite or that has nothing left to draw; and
        logprobs (n,) fp32, ``log_softmax(logits)`` at the drawn id, before penalties and bars; 0 or NaN where it is -1.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together, an `impl` that does not exist or run here.
    """
    _check(logits, counts, barred, settings, uniforms)
    if impl == "auto":
        impl = sample_rows_choice(logits.device, logits.dtype).impl
    return _choice.form_of("sample_rows", impl, _FORMS)(logits, counts, barred, settings, uniforms)


def _check(logits: Tensor, counts: Tensor | None, barred: Tensor, settings: Tensor, uniforms: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_floating_point() or not 1 <= logits.shape[1] <= LARGEST_VOCABULARY:
        raise KernelError(
            f"sample_rows: logits must be (n, V), floating, V from 1 to {LARGEST_VOCABULARY}; "
            f"got {tuple(logits.shape)} {logits.dtype}"
        )
    if logits.stride(1) != 1:
        raise KernelError(f"sample_rows: the last stride of logits must be 1, got {logits.stride(1)}")
    n, vocab_size = logits.shape
    wanted = {
        "counts": (counts, (n, vocab_size), torch.float32),
        "barred": (barred, (vocab_size,), torch.bool),
        "settings": (settings, (n, 5), torch.float64),
        "uniforms": (uniforms, (n,), torch.float64),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise KernelError(
                f"sample_rows: {name} must be {shape} {dtype} and contiguous, got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != logits.device:
            raise KernelError(f"sample_rows: all tensors must be on {logits.device}; {name} is on {tensor.device}")
