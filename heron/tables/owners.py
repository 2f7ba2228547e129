"""Tables over several processes: each owns every W-th row of all tables, lends these to a step, alone steps them."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from heron.dist import Ranks


class Owners:
    """Which process has which rows: row i of a table is row i // W of process i mod W, its *owner*.

    Frequent tokens lie side by side in a vocabulary; so dealt, each process has its share of them.

    Args:
        ranks: the processes, W of them.
        n_rows: V, of each table.

    Attributes:
        place: this process's number, and W.
    """

    def __init__(self, ranks: Ranks, n_rows: int):
        self._ranks, self._n_rows = ranks, n_rows
        self.place = ranks.rank, ranks.count

    def share(self, table: Tensor) -> Tensor:
        """A copy of the rows of a whole table that this process owns."""
        return table[self._ranks.rank :: self._ranks.count].clone()

    def n_elsewhere(self, table: Tensor) -> int:
        """How many values of a table, of which `table` is this process's share, the others have."""
        return (self._n_rows - len(table)) * table.shape[1]

    def request(self, ids: Tensor) -> Request:
        """Ask the owners for the rows of token ids (n,) int64, all different, on the host. All processes do it."""
        ranks, W = self._ranks, self._ranks.count
        owner = ids % W
        ids = ids[torch.from_numpy(np.argsort(owner.numpy(), kind="stable"))]
        wanted = torch.bincount(owner, minlength=W)
        told = torch.empty(W, 2, dtype=torch.int64)
        ranks.exchange([torch.stack((wanted, torch.full_like(wanted, len(ids))), dim=1)], [told], [1] * W, [1] * W)
        lent, most = told[:, 0], int(told[:, 1].max())
        asked = torch.empty(int(lent.sum()), dtype=torch.int64)
        ranks.exchange([ids // W], [asked], wanted.tolist(), lent.tolist())

        times = torch.bincount(asked)  # that each row is lent
        owned = times.nonzero().flatten()
        place = torch.empty_like(times)
        place[owned] = torch.arange(len(owned))
        order = torch.from_numpy(np.argsort(asked.numpy(), kind="stable"))
        return Request(ranks, ids, most, wanted.tolist(), owned, times[owned], lent.tolist(), place[asked], order)

    def whole(self, shares: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
        """Whole tables by name, on the host, from the shares of all processes, which call it together.

        They lie in a file that has no name any more and is mapped: no process's memory need hold them.

        Args:
            folder: which all processes see.

        Raises:
            HeronError: in all processes, where one cannot write.
        """
        n_bytes = [share.shape[1] * share.element_size() for share in shares.values()]  # of a row
        starts = [0, *(self._n_rows * n for n in np.cumsum(n_bytes).tolist())]
        mapped: dict[str, Tensor] = {}

        def begin() -> Path:
            path = folder / f".tmp-{uuid.uuid4().hex}-tables"
            with open(path, "xb") as file:
                file.truncate(starts[-1])
            return path

        def write() -> None:
            with open(path, "r+b") as file:
                for share, start, size in zip(shares.values(), starts, n_bytes, strict=False):
                    rows = share.detach().cpu().contiguous().view(torch.uint8).numpy()
                    for number, row in zip(range(self._ranks.rank, self._n_rows, self._ranks.count), rows, strict=True):
                        file.seek(start + number * size)
                        file.write(row)

        def read() -> None:
            for (name, share), start, size in zip(shares.items(), starts, n_bytes, strict=False):
                raw = np.memmap(path, np.uint8, "c", start, (self._n_rows, size))
                mapped[name] = torch.from_numpy(raw).view(share.dtype)

        path = self._ranks.first(begin)
        try:
            self._ranks.each(write)
            self._ranks.each(read)
        finally:
            if self._ranks.is_first:
                path.unlink()
        return mapped


@dataclasses.dataclass(frozen=True)
class Request:
    """The rows that a process needs for a step, and those that all processes need of it.

    Attributes:
        ids: (n,) int64: whose rows it needs, ordered by their owners.
        most: the largest n of all processes.
        wanted: how many of `ids` from each process.
        owned: (m,) int64, ascending: which of its own rows anybody needs, by their number in its share.
        times: (m,) int64: how many processes need each of these.
        lent: how many rows each process needs.
        at: (sum of lent,) int64: where each of those rows is in `owned`.
        order: (sum of lent,) int64: these by their row, in the order of the processes where several need one.
    """

    ranks: Ranks
    ids: Tensor
    most: int
    wanted: list[int]
    owned: Tensor
    times: Tensor
    lent: list[int]
    at: Tensor
    order: Tensor

    @torch.no_grad()
    def fetch(self, owned: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        """Fill the rows (n, width) of each table from those that their owners have at hand.

        All tables' rows of a token travel as one, since each transfer costs the host as much as many kernels do.

        Args:
            owned: (m, width) of each table, on the device of `rows` and of one dtype.
        """
        lent = torch.cat(list(owned), dim=1).index_select(0, _onto(self.at, owned[0].device))
        received = lent.new_empty(len(self.ids), lent.shape[1])
        self.ranks.exchange([lent], [received], self.lent, self.wanted)
        torch.split_with_sizes_copy(received, [part.shape[1] for part in rows], dim=1, out=list(rows))

    @torch.no_grad()
    def give_back(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients (m, width) of the owned rows of each table: the sums of those that all processes have.

        Added up in the order of the processes, so that a run repeats bit for bit.

        Args:
            gradients: (n, width) of the rows in `ids`, of each table, of one dtype.
        """
        given = torch.cat(list(gradients), dim=1)
        received = given.new_empty(len(self.at), given.shape[1])
        self.ranks.exchange([given], [received], self.wanted, self.lent)
        if len(self.owned):
            order, times = (_onto(part, given.device) for part in (self.order, self.times))
            received = torch.segment_reduce(received.index_select(0, order), "sum", lengths=times, unsafe=True)
        widths = [part.shape[1] for part in gradients]
        return list(torch.split_with_sizes_copy(received, widths, dim=1))  # pyright: ignore[reportArgumentType]


def _onto(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the host to a device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
