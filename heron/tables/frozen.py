"""Rows of frozen tables, brought to a GPU while it still ends the step before the one that reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heron.tables.bus import parts_of, shapes_of, size_of


class FrozenRows:
    """Picks rows of tables on the host and sends them to the device, on a stream beside the one that computes.

    The room on the device has two halves: a step reads its rows in one while those of the next arrive in the other.
    The room stays where it is while it is large enough, so a CUDA graph can read it. A copy engine sends the rows, so
    they take no multiprocessor from matrix products.

    Args:
        weights: the tables, (V, width) of one dtype, in memory of the host that need not be pinned.
        device: a CUDA device.
        before_moving: called before the room is replaced by a larger one.
    """

    def __init__(self, weights: Sequence[Tensor], device: torch.device, before_moving: Callable[[], None]):
        self._weights = [weight.detach() for weight in weights]
        self._device, self._before_moving = device, before_moving
        self._stream = torch.cuda.Stream(device)
        self._rooms: list[Tensor] = []  # of each table: both halves
        self._half, self._in_second = 0, True  # rows in a half; which one the last step has
        self._begun = None  # an event: all that came before the last `bring` is done

    @torch.no_grad()
    def bring(self, ids: Tensor, most: int) -> tuple[list[Tensor], int]:
        """Bring the rows of `ids` of each table; what the current stream does next finds them there.

        The host waits until the device has done the step before the last one.

        Args:
            ids: (n,) int64, on the host.
            most: the largest n that can come; a half has no more rows than this.

        Returns:
            A matrix (2 x rows of a half, width) for each table, in its dtype, and the row of it that has the first id.
        """
        main = torch.cuda.current_stream(self._device)
        if self._begun is not None:
            self._begun.synchronize()  # who has read the half that is to be filled is done
        self._begun = main.record_event()
        n = len(ids)
        if n > self._half:
            self._make_room(max(n, min(n + n // 4 + 64, most)))
            self._stream.wait_event(self._begun)  # who had that memory is done
        self._in_second = not self._in_second
        first = self._half * self._in_second
        with torch.cuda.stream(self._stream):
            for weight, room in zip(self._weights, self._rooms, strict=True):
                picked = torch.empty(n, weight.shape[1], dtype=weight.dtype, pin_memory=self._device.type == "cuda")
                torch.index_select(weight, 0, ids, out=picked)
                room[first : first + n].copy_(picked, non_blocking=True)
            arrived = self._stream.record_event()
        main.wait_event(arrived)
        return self._rooms, first

    def _make_room(self, half: int) -> None:
        """Room for so many rows twice."""
        self._before_moving()
        self._rooms, self._half = [], half
        shapes = shapes_of(self._weights, 2 * half)
        block = torch.empty(size_of(shapes), dtype=self._weights[0].dtype, device=self._device)
        self._rooms = parts_of(block, shapes)
