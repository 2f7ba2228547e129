"""Gradients of several processes, added up in buckets while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

_BUCKET = 32 << 20  # bytes of gradients that travel together


class Reduction:
    """Adds up the gradients of `leaves` over all processes, a bucket at a time.

    With `overlapped` a bucket leaves as soon as it is full, while the backward pass goes on, in a recorded pass too;
    gradients of several passes leave together, at :meth:`finish`. As a bucket leaves, its gradients become parts of it.

    Attributes:
        held: whether all buckets wait for :meth:`finish`, as a process may have to do its pass again.
    """

    def __init__(self, leaves: Iterable[nn.Parameter], overlapped: bool):
        self._buckets = _buckets(leaf for leaf in leaves if leaf.requires_grad)
        self._under_way: list[Any] = []
        self._missing = list(map(len, self._buckets))
        self.held = False
        for number, bucket in enumerate(self._buckets) if overlapped else ():
            for leaf in bucket:
                leaf.register_post_accumulate_grad_hook(partial(self._arrived, number))

    def finish(self) -> None:
        """End it, after the backward pass: every leaf has the gradient of all processes."""
        for number, missing in enumerate(self._missing):
            if missing:  # all of them, or those that this model has no use for
                self._send(number)
        for work in self._under_way:
            work.wait()
        self.forget()

    def forget(self) -> None:
        """Begin anew, after a pass that failed."""
        self._under_way, self._missing = [], list(map(len, self._buckets))

    def _arrived(self, number: int, _: Tensor) -> None:
        if self.held:
            return
        self._missing[number] -= 1
        if not self._missing[number]:
            self._send(number)

    @torch.no_grad()
    def _send(self, number: int) -> None:
        leaves = [leaf for leaf in self._buckets[number] if leaf.grad is not None]
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        if len(gradients) == 1 and gradients[0].is_contiguous():
            flat = gradients[0]
        elif gradients:  # torch.cat takes five times as long for as many
            flat = gradients[0].new_empty(sum(gradient.numel() for gradient in gradients))
            parts = torch._C._nn.unflatten_dense_tensors(flat, gradients)  # pyright: ignore[reportAttributeAccessIssue]
            torch._foreach_copy_(parts, gradients)  # pyright: ignore[reportPrivateImportUsage]
            for leaf, part in zip(leaves, parts, strict=True):
                leaf.grad = part
        else:
            return
        self._under_way.append(distributed.all_reduce(flat, async_op=True))


def _buckets(leaves: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of one dtype that travel together, in the order in which a backward pass reaches them, about.

    One that fills a bucket travels alone and is not copied. So does the embedding, the last to have its gradient: what
    arrives before it is on its way by then.
    """
    buckets: list[list[nn.Parameter]] = []
    filling: dict[torch.dtype, tuple[list[nn.Parameter], int]] = {}
    for leaf in reversed(list(leaves)):
        n_bytes = leaf.numel() * leaf.element_size()
        if n_bytes >= _BUCKET:
            buckets.append([leaf])
            continue
        bucket, filled = filling.get(leaf.dtype, ([], _BUCKET))
        if filled >= _BUCKET:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(leaf)
        filling[leaf.dtype] = bucket, filled + n_bytes
    return buckets
