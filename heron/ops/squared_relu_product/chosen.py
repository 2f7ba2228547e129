"""Which form of the kernels is the fastest, and whether that is faster than products and elementwise operations one by
one: measured once for sizes, kept on disk."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from heron.errors import KernelError
from heron.ops import large_product
from heron.ops.large_product import chosen, cublaslt
from heron.ops.squared_relu_product import cuda


class Measured(NamedTuple):
    """Numbers of the fastest forms, and whether both together take less time than operations one by one."""

    forward: int
    backward: int
    is_faster: bool


_NOT_MEASURED = Measured(0, 0, False)
_known: dict[tuple[torch.device, int, int, int], Measured] = {}


def measured(device: torch.device, n: int, n_in: int, hidden: int) -> Measured:
    """What is the fastest for these sizes.

    While a CUDA graph is recorded, and where there is no memory for it, nothing is measured: then nothing is faster.

    Args:
        device: of CUDA, of compute capability 9.0.
        n: tokens.
        n_in: channels of what the key is made of, and of what is made of its square.
        hidden: channels of the key.
    """
    sizes = device, n, n_in, hidden
    if sizes in _known:
        return _known[sizes]
    kept = chosen.Kept(chosen.file_of(device, f"squared-relu-{_versions()}"))
    name = f"{n} tokens, {n_in} x {hidden}"
    try:
        found = Measured(*kept.all()[name])
    except (KeyError, TypeError):
        if torch.cuda.is_current_stream_capturing():
            return _NOT_MEASURED
        try:
            with no_dispatch(), torch.no_grad():  # a compiler that looks at shapes alone may be asking
                found = _measure(*sizes)
        except torch.OutOfMemoryError:
            return _NOT_MEASURED
        kept.add(name, found)
    _known[sizes] = found
    return found


def _versions() -> str:
    """Of the kernels and of what they are compared with."""
    kernels = hashlib.sha256(cuda.SOURCE.read_bytes()).hexdigest()[:16]
    try:
        return f"{kernels}-cublaslt-{cublaslt.version()}"
    except KernelError:  # PyTorch came without it, and multiplies by other means
        return f"{kernels}-torch-{torch.__version__}"


def _measure(device: torch.device, n: int, n_in: int, hidden: int) -> Measured:
    random = torch.Generator(device).manual_seed(0)

    def drawn(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(rows, columns, generator=random, device=device)).bfloat16()

    def fastest(run: Callable[[int], object]) -> tuple[float, int]:
        return min((chosen.seconds(functools.partial(run, form)), form) for form in range(cuda.FORMS))

    x, d_out = drawn(n, n_in), drawn(n, n_in)
    key, value = drawn(hidden, n_in, n_in**-0.5), drawn(n_in, hidden, n_in**-0.5)
    square = cuda.by_boxes(x, key, None, 0)
    mine, forward = fastest(lambda form: cuda.by_boxes(x, key, None, form))
    mine_backward, backward = fastest(lambda form: cuda.by_boxes(d_out, value, square, form))
    theirs = chosen.seconds(lambda: large_product.large_product(x, key.T))
    theirs += chosen.seconds(lambda: large_product.large_product(d_out, value))
    # The compiler's kernels read the key and write its square, and backward they also read the square's gradient and
    # write the key's.
    theirs += 3 * chosen.seconds(lambda: torch.relu(square))
    return Measured(forward, backward, mine + mine_backward < chosen.GAIN * theirs)
