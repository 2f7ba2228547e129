"""Independent products of small matrices, beside one another on a GPU. README.md says why."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["is_small", "small_products"]
LIMIT = 32 << 20  # bytes of a matrix: smaller ones of several products are in the L2 cache at one time
STREAMS = 4

_library = torch.library.Library("heron", "FRAGMENT")
_library.define("small_products(Tensor[] a, Tensor[] b) -> Tensor[]")


def is_small(a: Tensor, b: Tensor) -> bool:
    """Whether the product of (n, k) and (k, m) is of matrices smaller than LIMIT, and gives one."""
    return max(a.numel(), b.numel(), a.shape[0] * b.shape[1]) * a.itemsize < LIMIT


def small_products(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """``[a[0] b[0], a[1] b[1], ...]``, bit for bit what PyTorch gives one after another. There is no gradient.

    On a GPU they are launched on several streams. A CUDA graph that records them has them side by side, too.

    Args:
        a: (n, k) each, all on one device.
        b: (k, m) each.

    Returns:
        (n, m) each.
    """
    return torch.ops.heron.small_products(a, b)


@torch.library.impl(_library, "small_products", "CUDA")
def _on_cuda(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    # All memory is allocated on the current stream. The other streams wait for it before they begin, and it waits for
    # them afterwards, so that memory is used again as if there were one stream.
    products = [one.new_empty(one.shape[0], other.shape[1]) for one, other in zip(a, b, strict=True)]
    device = a[0].device
    main = torch.cuda.current_stream(device)
    streams = [main, *_others(device)[: len(products) - 1]]
    begun = main.record_event()
    by_work = sorted(range(len(products)), key=lambda i: -products[i].numel() * a[i].shape[1])
    for nth, stream in enumerate(streams):
        if stream is not main:
            stream.wait_event(begun)
        with torch.cuda.stream(stream):
            for i in by_work[nth :: len(streams)]:
                torch.mm(a[i], b[i], out=products[i])
    for stream in streams[1:]:
        main.wait_event(stream.record_event())
    return products


@functools.cache
def _others(device: torch.device) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(STREAMS - 1)]


@torch.library.impl(_library, "small_products", "CPU")
def _on_cpu(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    return [torch.mm(one, other) for one, other in zip(a, b, strict=True)]


@torch.library.register_fake("heron::small_products", lib=_library)
def _(a, b):
    return [one.new_empty(one.shape[0], other.shape[1]) for one, other in zip(a, b, strict=True)]
