"""DeepEmbed tables that train by rows: the rows of a step's tokens are brought, change, and go back; no others move."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heron.errors import ConfigError, DataError
from heron.model.deep_embed import Brought, DeepEmbed, Where
from heron.model.rwkv import RWKV
from heron.ops import rows
from heron.ops.rows import row_adamw_choice

_PREFETCHED_BYTES = 4 << 30  # of moments at most: beyond that they are stepped where they lie, over the bus


def distinct_ids(tokens: Tensor, vocab_size: int) -> Tensor:
    """The different ids among `tokens`, ascending. DataError for one outside the vocabulary.

    One pass on one thread. torch.unique sorts with all threads, which wait for each other at every digit: on a machine
    that did something else too that took 165 ms instead of 1, longer than the GPU's whole step.
    """
    ids = tokens.numpy().ravel()
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise DataError(f"tokens: ids must be 0 to {vocab_size - 1}, got {ids.min()} to {ids.max()}")
    seen = np.zeros(vocab_size, dtype=bool)
    seen[ids] = True
    return torch.from_numpy(np.flatnonzero(seen))


class RowTables:
    """Moves a model to a device, with or without its tables, and brings the rows that a step needs, of all layers::

        tables = RowTables(model, device, "host")
        optimizer = heron.build_optimizer(model, tables=tables)
        tables.bring(tokens)                    # of the whole step, all its micro-batches
        model.loss(tokens, targets).backward()  # the gradients of the rows are in `tables.rows`
        optimizer.step()                        # changes these rows and their moments alone
        optimizer.zero_grad()                   # lets go of the rows

    The tables stay whole parameters of the model, so state_dict() is what it always is. Outside a step (validation,
    samples) they are looked up where they lie. In the host's memory they are pinned where the device is a GPU, and its
    kernels read and write them there, beside the computation: see docs/scale.md.

    Args:
        model: with one DeepEmbed table a layer or more, of any variant.
        device: where the rest of it goes.
        storage: "host", or "device" on a GPU that :func:`heron.ops.rows.row_adamw_choice` has kernels for.
        trains: whether the rows get gradients and are stepped; else they are frozen, and only brought.

    Raises:
        ConfigError: a model without tables; tables on a device that can't step them by rows.
    """

    impl = "auto"  # of heron.ops.rows.row_adamw_, where it is not a GPU that makes the step
    distinct = staticmethod(distinct_ids)

    def __init__(self, model: RWKV, device: torch.device, storage: str = "host", trains: bool = True):
        modules = [module for module in model.modules() if isinstance(module, DeepEmbed)]
        if not modules:
            raise ConfigError(
                f"tables {storage}: variant {model.config.variant} has no DeepEmbed tables; drop the setting"
            )
        self._modules, self._device, self._pins, self._trains = modules, device, device.type == "cuda", trains
        self._by_kernel = self._pins and row_adamw_choice(device, modules[0].weight.dtype).impl == "cuda"
        if storage == "device" and not self._by_kernel:
            raise ConfigError(f'tables device: {device} has no kernels that step them by rows; use storage "host"')
        self.rows: list[Tensor] = []  # (n or more, width) of each table in `weights`; empty outside a step
        self.ids = torch.empty(0, dtype=torch.int64)  # (n,) ascending, on the host: whose rows those are
        self._position: Tensor | None = None  # (V,) on the device: see Where
        self._room: list[Tensor] = []  # rows that stay where they are, with `recorded`
        self.before_moving: Callable[[], None] | None = None  # called before they get another place, with more room
        if storage == "device":
            model.to(device)
        else:
            tables = []
            for module in modules:
                tables.append(_pinned(module.weight.detach().cpu(), self._pins))
                del module.weight
            model.to(device)
            for module, table in zip(modules, tables, strict=True):
                module.weight = nn.Parameter(table, requires_grad=trains)
        self.weights = [module.weight for module in modules]
        self._bus = _Bus(self.weights, device) if self._by_kernel and storage == "host" else None
        for module in modules if self._bus else ():
            module.before_reading = self.wait
            module.register_state_dict_pre_hook(lambda *_: self.wait())

    @property
    def recordable(self) -> bool:
        """Whether :meth:`bring` can bring rows for a recorded pass: whether they come by kernel, and over no bus."""
        return self._by_kernel and self._bus is None

    def bring(self, tokens: Tensor, passes: int = 1, recorded: bool = False) -> None:
        """Bring the rows of token ids, int64 on the host, of any shape. It replaces what was brought before.

        Args:
            passes: forward and backward passes of the step. In the last, the moments of the rows follow.
            recorded: whether a CUDA graph will replay the pass. The rows then lie in the tensors `rows` of the last
                such step, unless there are too many for these; what is behind the rows in them is unused.

        Raises:
            DataError: an id outside the vocabulary.
        """
        V = self.weights[0].shape[0]
        self.ids = self.distinct(tokens, V)
        n = len(self.ids)
        if self._bus is not None:
            self._there, brought = self._bus.bring(self.ids)
            arrive = self._bus.arrive
        else:
            arrive = None
            self._there = _pinned(self.ids, self._pins).to(self._device, non_blocking=True)
            brought = self._gathered_in_place() if recorded else self._gathered()
        if self._position is None:
            self._position = torch.empty(V, dtype=torch.int64, device=self._device)
        self._position.fill_(-1)
        self._position[self._there] = torch.arange(n, device=self._device)
        self.rows = brought if recorded else [part.detach().requires_grad_(self._trains) for part in brought]
        if self._bus is not None and self.rows and self._trains:
            self._bus.prefetch_with(self.rows[len(self.rows) // 2], passes)
        gates_by_kernel = self._by_kernel and self.weights[0].shape[1] <= rows.LARGEST_WIDTH
        where = Where(self._position, gates_by_kernel, arrive)
        for module, part in zip(self._modules, self.rows, strict=True):
            module.brought = Brought(part, where)

    def step(
        self,
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        row_steps: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        found_inf: Tensor | None,
    ) -> None:
        """AdamW by rows for all rows that were brought, or, where `found_inf` is set and not 0, for none.

        Args:
            exp_avgs, exp_avg_sqs: of each table, where :meth:`place` puts them.
            row_steps: (V,) int32 of each table, with the rows that were brought: on the device where it has kernels.
            lr, betas, eps: see :func:`heron.ops.rows.row_adamw_`.
            found_inf: an fp32 scalar on the device.
        """
        gradients = self.gradients()
        if not gradients:
            return
        if self._bus is not None:
            self._bus.step(exp_avgs, exp_avg_sqs, row_steps, gradients, lr, betas, eps, found_inf)
        elif self._by_kernel:
            rows.cuda.row_adamw_(
                self.weights, exp_avgs, exp_avg_sqs, row_steps, gradients, self._there, self._there, self._there,
                lr, betas, eps, found_inf,
            )  # fmt: skip
        elif found_inf is None or not found_inf.item():
            parts = zip(self.weights, exp_avgs, exp_avg_sqs, row_steps, self._on_host(gradients), strict=True)
            for weight, exp_avg, exp_avg_sq, row_step, gradient in parts:
                rows.row_adamw_(
                    weight.detach(), exp_avg, exp_avg_sq, row_step, gradient, self.ids, lr, betas, eps, self.impl
                )

    def gradients(self) -> list[Tensor]:
        """The gradient (n, width) of each table's rows, where the network runs: zeros where nothing used them.

        None at all of rows that are frozen.
        """
        if not self._trains:
            return []
        n = len(self.ids)
        return [torch.zeros_like(part[:n]) if part.grad is None else part.grad[:n] for part in self.rows]

    def place(self, state: Tensor) -> Tensor:
        """What the optimizer keeps of a table, where :meth:`step` reads it: moments lie where the table does."""
        if state.dim() == 1 and self._by_kernel:
            return state.to(self._device)
        state = state.to(self.weights[0].device)
        return _pinned(state, self._pins and state.device.type == "cpu")

    def wait(self) -> None:
        """Wait until the tables on the host, and what the optimizer keeps of them, hold all that was stepped."""
        if self._bus is not None:
            self._bus.wait()

    def release(self) -> None:
        """Let go of the rows and their gradients: the tables themselves are looked up again."""
        self.rows = []
        for module in self._modules:
            module.brought = None

    @torch.no_grad()
    def _gathered(self) -> list[Tensor]:
        """The rows of the step on the device, of each table."""
        shapes = _shapes(self.weights, len(self.ids))
        if self._by_kernel:
            parts = _parts(torch.empty(_size(shapes), device=self._device), shapes)
            rows.copy_rows(self.weights, self._there, parts, None)
            return parts
        block = torch.empty(_size(shapes), dtype=self.weights[0].dtype, pin_memory=self._pins)
        for weight, part in zip(self.weights, _parts(block, shapes), strict=True):
            torch.index_select(weight, 0, self.ids, out=part)
        return _parts(block.to(self._device, non_blocking=True), shapes)

    @torch.no_grad()
    def _gathered_in_place(self) -> list[Tensor]:
        """The same as leaves that stay where they are, with room for some more, which grows when it must."""
        n = len(self.ids)
        if not self._room or len(self._room[0]) < n:
            if self.before_moving is not None:
                self.before_moving()
            self._room = []
            shapes = _shapes(self.weights, min(n + n // 4 + 64, len(self.weights[0])))
            block = torch.zeros(_size(shapes), device=self._device)
            self._room = [part.detach().requires_grad_() for part in _parts(block, shapes)]
        for part in self._room:
            part.grad = None
        rows.copy_rows(self.weights, self._there, [part.detach()[:n] for part in self._room], None)
        return self._room

    def _on_host(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradients on the host. Waits for a GPU."""
        if self._device.type == "cpu":
            return gradients
        shapes = [tuple(gradient.shape) for gradient in gradients]
        on_host = _parts(torch.empty(_size(shapes), dtype=gradients[0].dtype, pin_memory=True), shapes)
        for there, here in zip(gradients, on_host, strict=True):
            here.copy_(there, non_blocking=True)
        torch.cuda.synchronize(self._device)
        return on_host


class _Bus:
    """Rows on their way between pinned tables and the device, on two streams beside the one that computes.

    One stream reads, the other writes. Rows that were in the step before are taken from where they were stepped, so
    that only the others come over the bus, while the step begins. Moments follow in the backward pass, into memory that
    activations have left by then, if they are few enough. After the step rows and moments are written back.

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
    def bring(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`ids` (n,) and the rows of each table, on the device; the rows are there after :meth:`arrive`."""
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
        self._index = _pinned(torch.cat(lists)).to(self._device, non_blocking=True)
        self._ids, new_ids, new, at, known = self._index.split([len(part) for part in lists])
        self._parts = self._room_for(self._weights)
        with torch.cuda.stream(self._reading):
            if self._settled is not None:  # rows that were not in the last step are written
                self._reading.wait_event(self._settled)
            rows.copy_rows(self._weights, new_ids, self._parts, new, rows.cuda.BUS_BLOCKS)
            self._gathered = self._reading.record_event()
        if len(known):
            rows.copy_rows(before, at, self._parts, known)
        self._settled, self._prefetched = self._written, []
        return self._ids, self._parts

    def arrive(self) -> None:
        """Have the current stream wait for the rows that were brought."""
        if self._gathered is not None:
            torch.cuda.current_stream(self._device).wait_event(self._gathered)
            self._gathered = None

    def prefetch_with(self, rows_of_a_table: Tensor, passes: int) -> None:
        """Prefetch when these rows have got their gradient of the last of so many passes."""

        def hook(_: Tensor) -> None:
            nonlocal passes
            passes -= 1
            if passes == 0:
                self._prefetch()

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
        """See :meth:`RowTables.step`."""
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

    @torch.no_grad()
    def _prefetch(self) -> None:
        """Begin to copy the moments of the rows that were brought."""
        shapes = _shapes(self._moments, len(self._ids))
        if not shapes or _size(shapes) * self._moments[0].element_size() > _PREFETCHED_BYTES:
            return
        self._prefetched = self._room_for(self._moments)
        with torch.cuda.stream(self._reading):
            if self._written is not None:
                self._reading.wait_event(self._written)
            rows.copy_rows(self._moments, self._ids, self._prefetched, None, rows.cuda.BUS_BLOCKS)
            self._arrived = self._reading.record_event()

    def _room_for(self, tables: list[Tensor]) -> list[Tensor]:
        """Room on the device for the rows that are brought, of each of `tables`; the reading stream may fill it."""
        shapes = _shapes(tables, len(self._ids))
        block = tables[0].new_empty(_size(shapes), device=self._device)
        self._reading.wait_event(torch.cuda.current_stream(self._device).record_event())  # who had that memory is done
        for used in (block, self._index):
            used.record_stream(self._reading)
        return _parts(block, shapes)


def row_tables(model: RWKV, device: torch.device, storage: str, trains: bool = True) -> RowTables | None:
    """The tables of a model that trains on `device`; None where they are plain parameters, which dense AdamW steps.

    That is what they are on a device that has no kernels for rows, in a model without tables, and on any device where
    they are frozen (not `trains`).

    Raises:
        ConfigError: `storage` is "host" and there are no tables.
    """
    if storage == "host":
        return RowTables(model, device, storage, trains)
    by_rows = trains and device.type == "cuda" and any(isinstance(module, DeepEmbed) for module in model.modules())
    if by_rows and row_adamw_choice(device, next(model.parameters()).dtype).impl == "cuda":
        return RowTables(model, device, storage)
    return None


def _shapes(tables: Sequence[Tensor], n: int) -> list[tuple[int, int]]:
    """Of the matrices that `n` rows of each table make."""
    return [(n, table.shape[1]) for table in tables]


def _size(shapes: Sequence[tuple[int, ...]]) -> int:
    """Values in matrices of these shapes."""
    return sum(map(math.prod, shapes))


def _parts(block: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The matrices in a block of memory."""
    return [part.view(shape) for part, shape in zip(block.split([_size([s]) for s in shapes]), shapes, strict=True)]


def _pinned(tensor: Tensor, wanted: bool = True) -> Tensor:
    """A tensor of the host in pinned memory, if it is `wanted`."""
    return tensor.pin_memory() if wanted and not tensor.is_pinned() else tensor


def _same(these: list[Tensor], those: list[Tensor]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))
