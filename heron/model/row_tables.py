"""DeepEmbed tables that train by rows: the rows of a step's tokens are brought, change, and go back; no others move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heron.errors import ConfigError, DataError
from heron.model.deep_embed import Brought, DeepEmbed
from heron.model.rwkv import RWKV
from heron.ops import _select, rows

_PREFETCHED_BYTES = 1 << 30  # of moments at most: beyond that they are stepped where they lie, over the bus


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
        storage: "host", or "device" on a GPU that :func:`heron.ops._select.row_adamw` has kernels for.

    Raises:
        ConfigError: a model without tables; tables on a device that can't step them by rows.
    """

    impl = "auto"  # of heron.ops.rows.row_adamw_, where it is not a GPU that makes the step

    def __init__(self, model: RWKV, device: torch.device, storage: str = "host"):
        modules = [module for module in model.modules() if isinstance(module, DeepEmbed)]
        if not modules:
            raise ConfigError(
                f"tables {storage}: variant {model.config.variant} has no DeepEmbed tables; drop the setting"
            )
        self._modules, self._device, self._pins = modules, device, device.type == "cuda"
        self._by_kernel = self._pins and _select.row_adamw(device, modules[0].weight.dtype).impl == "cuda"
        if storage == "device" and not self._by_kernel:
            raise ConfigError(f'tables device: {device} has no kernels that step them by rows; use storage "host"')
        self.rows: list[Tensor] = []  # (n, width) of each table in `weights`; empty outside a step
        self.ids = torch.empty(0, dtype=torch.int64)  # (n,) ascending, on the host: whose rows those are
        if storage == "device":
            model.to(device)
        else:
            tables = []
            for module in modules:
                tables.append(_pinned(module.weight.detach().cpu(), self._pins))
                module.weight = None
            model.to(device)
            for module, table in zip(modules, tables, strict=True):
                module.weight = nn.Parameter(table)
        self.weights = [module.weight for module in modules]
        self._bus = _Bus(self.weights, device) if self._by_kernel and storage == "host" else None
        for module in modules if self._bus else ():
            module.before_reading = self.wait
            module.register_state_dict_pre_hook(lambda *_: self.wait())

    def bring(self, tokens: Tensor) -> None:
        """Bring the rows of token ids, int64 on the host, of any shape. It replaces what was brought before.

        Raises:
            DataError: an id outside the vocabulary.
        """
        self.ids = torch.unique(tokens)
        V, n = self.weights[0].shape[0], len(self.ids)
        if n and not 0 <= int(self.ids[0]) <= int(self.ids[-1]) < V:
            raise DataError(f"tokens: ids must be 0 to {V - 1}, got {int(self.ids[0])} to {int(self.ids[-1])}")
        if self._bus is not None:
            self._there, brought = self._bus.bring(self.ids)
        else:
            self._there = _pinned(self.ids, self._pins).to(self._device, non_blocking=True)
            brought = self._gathered()
        position = torch.full((V,), -1, device=self._device)
        position[self._there] = torch.arange(n, device=self._device)
        self.rows = [part.detach().requires_grad_() for part in brought]
        for module, part in zip(self._modules, self.rows, strict=True):
            module.brought = Brought(part, position)

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
            self._bus.step(exp_avgs, exp_avg_sqs, row_steps, gradients, self._there, lr, betas, eps, found_inf)
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
        """The gradient (n, width) of each table's rows, where the network runs: zeros where nothing used them."""
        return [torch.zeros_like(part) if part.grad is None else part.grad for part in self.rows]

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

    One stream reads, the other writes. The rows of a step go into one of two blocks in turns. Those that were in the
    step before are taken from its block, once they have been stepped there, so that only the others come over the bus,
    and for these it need not be waited: they were last written in a step before that one. Moments follow while the
    step computes, if they are few enough, into a third block. After the step rows and moments are written back.

    Args:
        weights: the tables, in pinned memory.
        device: a CUDA device.
    """

    def __init__(self, weights: list[Tensor], device: torch.device):
        self._weights, self._device = weights, device
        self._reading, self._writing = (torch.cuda.Stream(device) for _ in range(2))
        self._capacity = 0  # rows
        self._blocks: list[Tensor] = []  # that of the step, and that of the one before
        self._parts: list[Tensor] = []  # the rows in the first
        self._position: Tensor | None = None  # (V,) on the host: where a row is in the first block, -1: it is not
        self._versions: list[int] = []  # of the tables, when the first block was filled
        self._settled = self._written = self._kept = None  # events: see bring
        self._moments: list[Tensor] = []  # as the last step had them
        self._near: Tensor | None = None  # the third block
        self._prefetched: list[Tensor] = []  # the moments' rows in it, for this step
        self._arrived: torch.cuda.Event | None = None  # of that copy

    @torch.no_grad()
    def bring(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`ids` (n,) and the rows of each table, both on the device, for the current stream."""
        shapes = _shapes(self._weights, len(ids))
        versions = [weight._version for weight in self._weights]
        if len(ids) > self._capacity:
            self._grow(len(ids))
        elif versions != self._versions:  # others have written into the tables
            self.wait()
            self._position = None
        before, self._blocks = self._parts, self._blocks[::-1]
        self._parts, self._versions = _parts(self._blocks[0][: _size(shapes)], shapes), versions
        at = torch.full_like(ids, -1) if self._position is None else self._position[ids]
        new, known = (at < 0).nonzero().flatten(), (at >= 0).nonzero().flatten()
        self._position = torch.full((len(self._weights[0]),), -1)
        self._position[ids] = torch.arange(len(ids))

        lists = (ids, ids[new], new, at[known], known)
        main = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._reading):
            index = _pinned(torch.cat(lists)).to(self._device, non_blocking=True)
            ids, new_ids, new, at, known = index.split([len(part) for part in lists])
            listed = self._reading.record_event()
            for event in (self._settled, self._kept):  # the block is free, and rows not in the last step are written
                if event is not None:
                    self._reading.wait_event(event)
            rows.copy_rows(self._weights, new_ids, self._parts, new, rows.cuda.BUS_BLOCKS)
            gathered = self._reading.record_event()
            self._prefetch(ids)
        for stream in (main, self._writing):
            index.record_stream(stream)
        main.wait_event(listed)
        if len(known):
            rows.copy_rows(before, at, self._parts, known)
        self._kept, self._settled = main.record_event(), self._written
        main.wait_event(gathered)
        return ids, self._parts

    @torch.no_grad()
    def step(
        self,
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        row_steps: Sequence[Tensor],
        gradients: Sequence[Tensor],
        ids: Tensor,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        found_inf: Tensor | None,
    ) -> None:
        """See :meth:`RowTables.step`."""
        main, n = torch.cuda.current_stream(self._device), len(exp_avgs)
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
        self._moments, self._prefetched = moments, []
        if untouched:
            self._versions = [weight._version for weight in self._weights]

    def wait(self) -> None:
        """Wait until all that was stepped is written."""
        if self._written is not None:
            self._written.synchronize()

    def __del__(self) -> None:
        self.wait()  # whose memory the tables had would find them still being written

    def _prefetch(self, ids: Tensor) -> None:
        """Begin to copy the moments of these rows, on the current stream."""
        shapes = _shapes(self._moments, len(ids))
        self._prefetched = []
        if not shapes or _size(shapes) * self._moments[0].element_size() > _PREFETCHED_BYTES:
            return
        if self._near is None or self._near.dtype != self._moments[0].dtype:
            widths = sum(width for _, width in shapes)
            self._near = self._moments[0].new_empty(self._capacity * widths, device=self._device)
        if self._written is not None:
            self._reading.wait_event(self._written)
        self._prefetched = _parts(self._near[: _size(shapes)], shapes)
        rows.copy_rows(self._moments, ids, self._prefetched, None, rows.cuda.BUS_BLOCKS)
        self._arrived = self._reading.record_event()

    def _grow(self, n: int) -> None:
        """Room for `n` rows and some more. It forgets what was brought, and waits for the device."""
        torch.cuda.synchronize(self._device)
        self._blocks, self._parts, self._near, self._prefetched = [], [], None, []
        self._position, self._capacity = None, n + n // 8
        widths = sum(weight.shape[1] for weight in self._weights)
        self._blocks = [self._weights[0].new_empty(self._capacity * widths, device=self._device) for _ in range(2)]


def row_tables(model: RWKV, device: torch.device, storage: str) -> RowTables | None:
    """The tables of a model that trains on `device`; None where they are plain parameters, which dense AdamW steps.

    That is what they are on a device that has no kernels for rows, and in a model without tables.

    Raises:
        ConfigError: `storage` is "host" and there are no tables.
    """
    if storage == "host":
        return RowTables(model, device, storage)
    by_rows = device.type == "cuda" and any(isinstance(module, DeepEmbed) for module in model.modules())
    if by_rows and _select.row_adamw(device, next(model.parameters()).dtype).impl == "cuda":
        return RowTables(model, device, storage)
    return None


def _shapes(tables: Sequence[Tensor], n: int) -> list[tuple[int, int]]:
    """Of the matrices that `n` rows of each table make."""
    return [(n, table.shape[1]) for table in tables]


def _size(shapes: list[tuple[int, int]]) -> int:
    """Values in matrices of these shapes."""
    return sum(n * width for n, width in shapes)


def _parts(block: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """The matrices in a block of memory."""
    return [part.view(shape) for part, shape in zip(block.split([_size([s]) for s in shapes]), shapes, strict=True)]


def _pinned(tensor: Tensor, wanted: bool = True) -> Tensor:
    """A tensor of the host in pinned memory, if it is `wanted`."""
    return tensor.pin_memory() if wanted and not tensor.is_pinned() else tensor


def _same(these: list[Tensor], those: list[Tensor]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))
