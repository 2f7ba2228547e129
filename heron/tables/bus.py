"""Rows of tables on their way between the host's pinned memory and a GPU, beside its computation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heron.ops import rows

_PREFETCHED_BYTES = 4 << 30  # of moments at most: beyond that they are stepped where they lie, over the bus


def shapes_of(tables: Sequence[Tensor], n: int) -> list[tuple[int, int]]:
    """Of the matrices that `n` rows of each table make."""
    return [(n, table.shape[1]) for table in tables]


def size_of(shapes: Sequence[tuple[int, ...]]) -> int:
    """Values in matrices of these shapes."""
    return sum(map(math.prod, shapes))


def parts_of(block: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The matrices in a block of memory."""
    return [part.view(shape) for part, shape in zip(block.split([size_of([s]) for s in shapes]), shapes, strict=True)]


def pinned(tensor: Tensor, wanted: bool = True) -> Tensor:
    """A tensor of the host in pinned memory, if it is `wanted`."""
    return tensor.pin_memory() if wanted and not tensor.is_pinned() else tensor


class Bus:
    """Rows on their way between pinned tables and the device, on two streams beside the one that computes.

    One stream reads, the other writes. Rows that were in the step before are taken from where they were stepped, so
    that only the others come over the bus, while the step begins. Moments follow in the backward pass, into memory that
    activations have left by then, if they are few enough. After the step rows and moments are written back.

    What comes *ahead* comes into memory of its own, so that it waits for nothing that computes: rows while the step
    before is made, moments from the beginning of their own.

    Args:
        weights: the tables, in pinned memory.
        device: a CUDA device.
    """

    def __init__(self, weights: list[Tensor], device: torch.device):
        self._weights, self._device = weights, device
        self._reading, self._writing = (torch.cuda.Stream(device) for _ in range(2))
        self._index: Tensor  # what the last `bring` sent, its ids among it
        self._ids: Tensor  # of the rows that were brought last, on the device
        self._parts: list[Tensor] = []  # these rows
        self._position: Tensor | None = None  # (V,) on the host: where a row is among them, -1: it is not
        self._versions: list[int] = []  # of the tables, when they were brought
        self._gathered = self._settled = self._written = None  # events: see bring
        self._moments: list[Tensor] = []  # as the last step had them
        self._prefetched: list[Tensor] = []  # the moments' rows for this step
        self._arrived: Any = None  # the event of that copy

    @torch.no_grad()
    def bring(self, ids: Tensor, ahead: bool = False) -> tuple[Tensor, list[Tensor]]:
        """`ids` (n,) and the rows of each table, on the device; the rows are there after :meth:`arrive`.

        Args:
            ahead: whether they come ahead. The current stream then waits for them at once.
        """
        versions = [weight._version for weight in self._weights]
        if versions != self._versions:  # others have written into the tables
            self.wait()
            self._position = None
        before, self._versions = self._parts, versions
        at = torch.full_like(ids, -1) if self._position is None else self._position[ids]
        new, known = (at < 0).nonzero().flatten(), (at >= 0).nonzero().flatten()
        self._position = torch.full((len(self._weights[0]),), -1)
        self._position[ids] = torch.arange(len(ids))

        lists = (ids, ids[new], new, at[known], known)
        main = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._reading if ahead else main):
            self._index = pinned(torch.cat(lists)).to(self._device, non_blocking=True)
        self._index.record_stream(main if ahead else self._reading)
        self._ids, new_ids, new, at, known = self._index.split([len(part) for part in lists])
        self._parts = self._room_for(self._weights, ahead)
        with torch.cuda.stream(self._reading):
            if self._settled is not None:  # rows that were not in the last step are written
                self._reading.wait_event(self._settled)
            rows.copy_rows(self._weights, new_ids, self._parts, new, rows.cuda.BUS_BLOCKS)
            self._gathered = self._reading.record_event()
        if ahead:
            self.arrive()
        if len(known):
            rows.copy_rows(before, at, self._parts, known)
        self._settled, self._prefetched = self._written, []
        return self._ids, self._parts

    def arrive(self) -> None:
        """Have the current stream wait for the rows that were brought."""
        if self._gathered is not None:
            torch.cuda.current_stream(self._device).wait_event(self._gathered)
            self._gathered = None

    @torch.no_grad()
    def prefetch(self, ahead: bool = False) -> None:
        """Begin to copy the moments of the rows that were brought, or copy none if they take too much room.

        Args:
            ahead: whether they come ahead.
        """
        shapes = shapes_of(self._moments, len(self._ids))
        if not shapes or size_of(shapes) * self._moments[0].element_size() > _PREFETCHED_BYTES:
            return
        self._prefetched = self._room_for(self._moments, ahead)
        with torch.cuda.stream(self._reading):
            if self._written is not None:
                self._reading.wait_event(self._written)
            rows.copy_rows(self._moments, self._ids, self._prefetched, None, rows.cuda.BUS_BLOCKS)
            self._arrived = self._reading.record_event()

    def prefetch_with(self, rows_of_a_table: Tensor, passes: int) -> None:
        """:meth:`prefetch` when these rows have got their gradient of the last of so many passes."""

        def hook(_: Tensor) -> None:
            nonlocal passes
            passes -= 1
            if passes == 0:
                self.prefetch()

        rows_of_a_table.register_post_accumulate_grad_hook(hook)

    @torch.no_grad()
    def step(
        self,
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        row_steps: Sequence[Tensor],
        gradients: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        found_inf: Tensor | None,
    ) -> None:
        """See :meth:`heron.tables.rows.RowTables.step`."""
        main, n, ids = torch.cuda.current_stream(self._device), len(exp_avgs), self._ids
        self.arrive()
        moments = [*exp_avgs, *exp_avg_sqs]
        prefetched = self._prefetched if _same(moments, self._moments) else []
        untouched = self._versions == [weight._version for weight in self._weights]
        if prefetched:
            main.wait_event(self._arrived)
        near = prefetched or moments
        rows.cuda.row_adamw_(
            self._parts, near[:n], near[n:], row_steps, gradients, ids, None, None if prefetched else ids,
            lr, betas, eps, found_inf,
        )  # fmt: skip
        self._writing.wait_event(main.record_event())
        with torch.cuda.stream(self._writing):
            rows.copy_rows(self._parts, None, self._weights, ids, rows.cuda.BUS_BLOCKS)
            if prefetched:
                rows.copy_rows(prefetched, None, moments, ids, rows.cuda.BUS_BLOCKS)
            self._written = self._writing.record_event()
        for used in (self._index, *self._parts[:1], *prefetched[:1]):  # of a block, which is one for all tables
            used.record_stream(self._writing)
        self._moments, self._prefetched = moments, []
        if untouched:
            self._versions = [weight._version for weight in self._weights]

    def wait(self) -> None:
        """Wait until all that was stepped is written."""
        if self._written is not None:
            self._written.synchronize()

    def __del__(self) -> None:
        self.wait()  # rows are still being written to the tables, whose memory others may get next

    def _room_for(self, tables: list[Tensor], ahead: bool) -> list[Tensor]:
        """Room on the device for the rows that are brought, of each of `tables`; the reading stream may fill it."""
        shapes, main = shapes_of(tables, len(self._ids)), torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._reading if ahead else main):
            block = tables[0].new_empty(size_of(shapes), device=self._device)
        if not ahead:
            self._reading.wait_event(main.record_event())  # who had that memory is done
        block.record_stream(main if ahead else self._reading)
        return parts_of(block, shapes)


def _same(these: list[Tensor], those: list[Tensor]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))
