"""Large matrix products on a GPU, by the fastest of cuBLASLt's algorithms. README.md says why."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops.large_product import chosen, cublaslt

__all__ = ["add_large_product_", "is_large", "large_product", "sum_of_products"]
FEWEST = 3e10  # operations; what takes less is over before a launch from Python is
_DTYPES = (torch.bfloat16, torch.float16)

_library = torch.library.Library("heron", "FRAGMENT")
_library.define("large_product(Tensor a, Tensor b) -> Tensor")
_library.define("sum_of_products(Tensor a, Tensor b, Tensor c, Tensor d) -> Tensor")


def is_large(a: Tensor, b: Tensor) -> bool:
    """Whether algorithms are worth choosing for the product of (n, k) and (k, m)."""
    (n, k), m = a.shape, b.shape[1]
    of_cuda = a.device.type == "cuda" and torch.version.cuda is not None
    return of_cuda and a.dtype == b.dtype and a.dtype in _DTYPES and 2 * n * k * m >= FEWEST


def large_product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, bit for bit what PyTorch gives. There is no gradient.

    Where the product is large (:func:`is_large`), it is computed by the fastest algorithm of cuBLASLt that gives these
    bits; which one that is is measured at the first product of a form and kept in the cache.

    Args:
        a: (n, k).
        b: (k, m).

    Returns:
        (n, m).
    """
    return torch.ops.heron.large_product(a, b)


def sum_of_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """``a b + c d`` (n, m): the first as :func:`large_product`, the second added where it lies. No gradient."""
    return torch.ops.heron.sum_of_products(a, b, c, d)


def add_large_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b`` of half precision in fp32, in one product: (n, m), (n, k), (k, m) on a CUDA device. As above."""

    def by_pytorch(a: Tensor, b: Tensor, total: Tensor) -> None:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)

    _multiply(a, b, total, True, by_pytorch)


def _multiply(a: Tensor, b: Tensor, out: Tensor, adds: bool, by_pytorch: chosen.Multiply) -> None:
    multiply = by_pytorch
    lie = cublaslt.described(a), cublaslt.described(b), cublaslt.described(out)
    if is_large(a, b) and None not in lie:
        form = chosen.Form(*lie, adds)  # pyright: ignore[reportArgumentType]
        with contextlib.suppress(KernelError):  # PyTorch came without cuBLASLt
            multiply = chosen.table(out.get_device()).multiply(form, by_pytorch)
    multiply(a, b, out)


@torch.library.impl(_library, "large_product", "CUDA")
def _on_cuda(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    _multiply(a, b, out, False, lambda a, b, out: torch.mm(a, b, out=out))
    return out


def _sum(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    total = large_product(a, b)
    return torch.addmm(total, c, d, out=total)


_library.impl("large_product", torch.mm, "CPU")
for device in ("CPU", "CUDA"):
    _library.impl("sum_of_products", _sum, device)


@torch.library.register_fake("heron::large_product", lib=_library)
@torch.library.register_fake("heron::sum_of_products", lib=_library)
def _(a, b, *_):
    return a.new_empty(a.shape[0], b.shape[1])
