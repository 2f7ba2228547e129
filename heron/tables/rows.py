"""DeepEmbed tables that train by rows: the rows of a step's tokens are brought, change, and go back; no others move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from heron.dist import ALONE, Ranks
from heron.errors import ConfigError, DataError
from heron.model.deep_embed import Brought, Where, tables_of
from heron.model.rwkv import RWKV
from heron.ops import rows
from heron.ops.rows import copy_rows_choice, row_adamw_choice
from heron.tables.bus import Bus, parts_of, pinned, shapes_of, size_of
from heron.tables.frozen import FrozenRows
from heron.tables.owners import Owners, Request


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
        tables.collect()                        # of several processes, each its own samples' gradients
        optimizer.step()                        # changes these rows and their moments alone
        optimizer.zero_grad()                   # lets go of the rows

    The tables stay whole parameters of the model, so state_dict() is what it always is. Outside a step (validation,
    samples) they are looked up where they lie. Of several processes each keeps the rows that it owns alone, see
    :class:`heron.tables.owners.Owners`, and :meth:`whole` has them all. In the host's memory they are pinned where the
    device is a GPU, and its kernels read and write them there, beside the computation: see docs/scale.md. Frozen ones
    are not; the host picks their rows and sends them (:class:`heron.tables.frozen.FrozenRows`).

    Args:
        model: with one DeepEmbed table a layer or more, of any variant.
        device: where the rest of it goes.
        storage: "host", or "device" on a GPU that :func:`heron.ops.rows.row_adamw_choice` has kernels for.
        trains: whether the rows get gradients and are stepped; else they are frozen, and only brought.
        ranks: the processes that train together. Of tables that are frozen each has all rows.
        moves: whether the rest of the model goes to `device`; what becomes shards stays until then.

    Attributes:
        owners: of the rows; None: they are all here.

    Raises:
        ConfigError: a model without tables; tables on a device that can't step them by rows.
    """

    impl = "auto"  # of heron.ops.rows.row_adamw_, where it is not a GPU that makes the step
    distinct = staticmethod(distinct_ids)

    def __init__(
        self,
        model: RWKV,
        device: torch.device,
        storage: str = "host",
        trains: bool = True,
        ranks: Ranks = ALONE,
        moves: bool = True,
    ):
        named = tables_of(model)
        modules = list(named.values())
        if not modules:
            raise ConfigError(
                f"tables {storage}: variant {model.config.variant} has no DeepEmbed tables; drop the setting"
            )
        self._modules, self._device, self._pins, self._trains = modules, device, device.type == "cuda", trains
        choice = row_adamw_choice(device, modules[0].weight.dtype) if trains else copy_rows_choice(device)
        self._by_kernel = self._pins and choice.impl == "cuda"
        if storage == "device" and not self._by_kernel:
            raise ConfigError(f'tables device: {device} has no kernels that step them by rows; use storage "host"')
        self.rows: list[Tensor] = []  # (n or more, width) of each table in `weights`; empty outside a step
        self.ids = torch.empty(0, dtype=torch.int64)  # (n,) on the host: whose rows those are
        self._stepped = self.ids  # (m,) on the host, ascending: the rows of `weights` that change
        self._request: Request | None = None  # by which rows come from their owners
        self._collected: list[Tensor] | None = None  # (m, width) of each table: gradients of all processes
        self._position: Tensor | None = None  # (V,) on the device: see Where
        self._room: list[Tensor] = []  # rows that stay where they are, with `recorded`
        self.before_moving: Callable[[], None] | None = None  # called before they get another place, with more room
        self.owners = Owners(ranks, model.config.vocab_size) if trains and ranks.count > 1 else None
        tables = []
        for module in modules:
            table = module.weight.detach() if self.owners is None else self.owners.share(module.weight.detach())
            tables.append(table.to(device) if storage == "device" else pinned(table.cpu(), self._pins and trains))
            del module.weight
        if moves:
            model.to(device)
        for module, table in zip(modules, tables, strict=True):
            module.weight = nn.Parameter(table, requires_grad=trains)
        self.n_rows, self.names = model.config.vocab_size, [f"{name}.weight" for name in named]
        self.weights = [module.weight for module in modules]
        self._bus = Bus(self.weights, device) if self._by_kernel and storage == "host" and trains else None
        self._frozen = FrozenRows(self.weights, device, self._move) if self._pins and not trains else None
        for module in modules if self._bus else ():
            module.before_reading = self.wait
            module.register_state_dict_pre_hook(lambda *_: self.wait())

    @property
    def recordable(self) -> bool:
        """Whether :meth:`bring` can bring rows for a recorded pass."""
        return self._frozen is not None or self._by_kernel

    @property
    def n_elsewhere(self) -> int:
        """Values in rows that other processes have."""
        return 0 if self.owners is None else sum(map(self.owners.n_elsewhere, self.weights))

    def bring(self, tokens: Tensor, passes: int = 1, recorded: bool = False) -> None:
        """Bring the rows of token ids, int64 on the host, of any shape. It replaces what was brought before.

        Args:
            passes: forward and backward passes of the step. In the last, the moments of the rows follow.
            recorded: whether a CUDA graph will replay the pass. The rows then lie in the tensors `rows` of the last
                such step, unless there are too many for these; what is behind the rows in them is unused. They are
                there before the pass begins, and the moments follow at once.

        Raises:
            DataError: an id outside the vocabulary.
        """
        self.release()
        self.ids = self._stepped = self.distinct(tokens, self.n_rows)
        self._request = None if self.owners is None else self.owners.request(self.ids)
        if self._request is not None:
            self.ids, self._stepped = self._request.ids, self._request.owned
        arrive, first, in_place = None, 0, recorded and self._request is None
        if self._frozen is not None:
            self._there = self._onto_device(self.ids)
            brought, first = self._frozen.bring(self.ids, min(tokens.numel(), self.n_rows))
        elif self._bus is not None:
            self._there, brought = self._bus.bring(self._stepped, recorded)
            arrive = None if recorded else self._bus.arrive
            if in_place:
                brought = self._in_place(brought, None)
        else:
            self._there = self._onto_device(self._stepped)
            brought = self._in_place(self.weights, self._there) if in_place else self._gathered()
        looked_up = self._there
        if self._request is not None:
            brought, arrive = self._fetched(self._request, brought, arrive, recorded)
            looked_up = self._onto_device(self.ids)
        if self._position is None:
            self._position = torch.empty(self.n_rows, dtype=torch.int64, device=self._device)
        self._position.fill_(-1)
        self._position[looked_up] = torch.arange(first, first + len(self.ids), device=self._device)
        self.rows = brought if recorded else [part.detach().requires_grad_(self._trains) for part in brought]
        if self._bus is not None and recorded:
            self._bus.prefetch(ahead=True)
        elif self._bus is not None and self.rows:
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
                    weight.detach(), exp_avg, exp_avg_sq, row_step, gradient, self._stepped, lr, betas, eps, self.impl
                )

    def collect(self) -> None:
        """After the last backward pass: have the owner of each row add up its gradients of all processes."""
        if self._request is not None:
            self._collected = self._request.give_back(self.gradients())

    def gradients(self) -> list[Tensor]:
        """The gradient (n, width) of each table's rows, where the network runs: zeros where nothing used them.

        None at all of rows that are frozen. After :meth:`collect` those of the rows that are stepped here.
        """
        if not self._trains:
            return []
        if self._collected is not None:
            return self._collected
        n = len(self.ids)
        return [torch.zeros_like(part[:n]) if part.grad is None else part.grad[:n] for part in self.rows]

    def place(self, state: Tensor) -> Tensor:
        """What the optimizer keeps of a table, where :meth:`step` reads it: moments lie where the table does."""
        if state.dim() == 1 and self._by_kernel:
            return state.to(self._device)
        state = state.to(self.weights[0].device)
        return pinned(state, self._pins and state.device.type == "cpu")

    def wait(self) -> None:
        """Wait until the tables on the host, and what the optimizer keeps of them, hold all that was stepped."""
        if self._bus is not None:
            self._bus.wait()

    def whole(self, folder: Path) -> dict[str, Tensor]:
        """Whole tables by name, see :meth:`Owners.whole`; none where the model has whole ones."""
        self.wait()
        shares = dict(zip(self.names, self.weights, strict=True))
        return {} if self.owners is None else self.owners.whole(shares, folder)

    def release(self) -> None:
        """Let go of the rows and their gradients: the tables themselves are looked up again."""
        self.rows, self._collected = [], None
        for module in self._modules:
            module.brought = None

    def _onto_device(self, ids: Tensor) -> Tensor:
        return pinned(ids, self._pins).to(self._device, non_blocking=True)

    @torch.no_grad()
    def _gathered(self) -> list[Tensor]:
        """The rows of `_stepped` on the device, of each table."""
        shapes = shapes_of(self.weights, len(self._stepped))
        if self._by_kernel:
            parts = parts_of(torch.empty(size_of(shapes), device=self._device), shapes)
            rows.copy_rows(self.weights, self._there, parts, None)
            return parts
        block = torch.empty(size_of(shapes), dtype=self.weights[0].dtype, pin_memory=self._pins)
        for weight, part in zip(self.weights, parts_of(block, shapes), strict=True):
            torch.index_select(weight, 0, self._stepped, out=part)
        return parts_of(block.to(self._device, non_blocking=True), shapes)

    @torch.no_grad()
    def _in_place(self, sources: Sequence[Tensor], at: Tensor | None) -> list[Tensor]:
        """Copy rows `at` of `sources`, None: all rows, into the leaves of :meth:`_room_in_place`, and give these."""
        room = self._room_in_place()
        rows.copy_rows(sources, at, [part.detach()[: len(self.ids)] for part in room], None)
        return room

    def _room_in_place(self) -> list[Tensor]:
        """Leaves that stay where they are, with room for the rows and some more, which grows when it must.

        In all processes at once: what is recorded anew has exchanges in it.
        """
        n = len(self.ids) if self._request is None else self._request.most
        if not self._room or len(self._room[0]) < n:
            self._move()
            self._room = []
            shapes = shapes_of(self.weights, min(n + n // 4 + 64, self.n_rows))
            block = torch.zeros(size_of(shapes), device=self._device)
            self._room = [part.detach().requires_grad_() for part in parts_of(block, shapes)]
        for part in self._room:
            part.grad = None
        return self._room

    def _move(self) -> None:
        if self.before_moving is not None:
            self.before_moving()

    @torch.no_grad()
    def _fetched(
        self, request: Request, owned: list[Tensor], arrive: Callable[[], None] | None, recorded: bool
    ) -> tuple[list[Tensor], Callable[[], None] | None]:
        """The rows of `ids`, of each table, of which others have some, from those that are lent to all.

        Rows that are still on their way come when they are first used; then they go on to who asked.
        """
        shapes = shapes_of(self.weights, len(self.ids))
        if recorded:
            brought = self._room_in_place()
            parts = [part.detach()[: len(self.ids)] for part in brought]
        else:
            brought = parts = parts_of(owned[0].new_empty(size_of(shapes)), shapes)
        if arrive is None:
            request.fetch(owned, parts)
            return brought, None
        waiting = [arrive]

        def fetch() -> None:
            while waiting:
                waiting.pop()()
                request.fetch(owned, parts)

        return brought, fetch

    def _on_host(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradients on the host. Waits for a GPU."""
        if self._device.type == "cpu":
            return gradients
        shapes = [tuple(gradient.shape) for gradient in gradients]
        on_host = parts_of(torch.empty(size_of(shapes), dtype=gradients[0].dtype, pin_memory=True), shapes)
        for there, here in zip(gradients, on_host, strict=True):
            here.copy_(there, non_blocking=True)
        torch.cuda.synchronize(self._device)
        return on_host


def row_tables(
    model: RWKV,
    device: torch.device,
    storage: str,
    trains: bool = True,
    ranks: Ranks = ALONE,
    moves: bool = True,
    always: bool = False,
) -> RowTables | None:
    """The tables of a model that trains on `device`; None where they are plain parameters, which dense AdamW steps.

    That is what they are in one process on a device that has no kernels for rows, in a model without tables, and on any
    device where they are frozen (not `trains`). Where they train by rows in any case, a CPU's tables are on the host.

    Args:
        ranks, moves: see :class:`RowTables`. Several processes share rows, in any case.
        always: whether one process trains them by rows in any case, too.

    Raises:
        ConfigError: `storage` is "host" and there are no tables; by rows in any case on GPUs without kernels for rows.
    """
    if storage == "host":
        return RowTables(model, device, storage, trains, ranks, moves)
    if not trains or not tables_of(model):
        return None
    if always or ranks.count > 1:
        return RowTables(model, device, "host" if device.type == "cpu" else storage, trains, ranks, moves)
    if device.type == "cuda" and row_adamw_choice(device, next(model.parameters()).dtype).impl == "cuda":
        return RowTables(model, device, storage)
    return None
