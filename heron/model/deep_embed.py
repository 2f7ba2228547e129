"""DeepEmbed: learned rows per token and layer, looked up by the *input* token. The "8" of RWKV-8."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heron.errors import DataError
from heron.model.plain import is_plain
from heron.ops.rows import Places, gate_rows


class Where:
    """Which of the brought rows a token's is, the same for the tables of all layers.

    Args:
        position: (V,) int64: the row of a token id; -1: none.
        by_kernel: whether x is multiplied with rows by :func:`heron.ops.rows.gate_rows`.
        arrive: called before the rows are used: they may still be on their way.
    """

    def __init__(self, position: Tensor, by_kernel: bool, arrive: Callable[[], None] | None = None):
        self._position, self.by_kernel, self._arrive = position, by_kernel, arrive
        self._ids: Tensor | None = None
        self._places: Places | None = None  # of these ids

    def of(self, ids: Tensor) -> Tensor:
        """The row of each token id; DataError for one that was not brought (a GPU reports it later)."""
        if self._arrive is not None:
            self._arrive()
        where = self._position[ids]
        if where.device.type == "cpu" and (where < 0).any():
            raise DataError(f"tables: token {int(ids[where < 0][0])} was looked up, but not brought for this step")
        return where

    def places(self, ids: Tensor) -> Places:
        """The same for the kernel. What one layer asked for is there for the next, which asks with these very ids."""
        if self._places is None or self._ids is not ids:
            where = self.of(ids)
            # An id without a row would have the kernel read and write outside of them.
            torch._assert_async((where >= 0).all())  # pyright: ignore[reportPrivateImportUsage]
            self._ids, self._places = ids, Places.of(where)
        return self._places


class Brought(NamedTuple):
    """Some rows of a table that lies elsewhere: they are where the network runs, and they are what trains."""

    rows: Tensor  # (n, width), a leaf of the graph
    where: Where


class DeepEmbed(nn.Embedding):
    """A (V, width) table of gates, 1 at the start: ``gated = x * table[token]``. The parameter holds the gate itself.

    Source: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v8_rc00_demo.py (`ffn.enn.weight`) and its successors.
    """

    brought: Brought | None = None  # set by heron.tables.rows while a training step runs
    before_reading: Callable[[], None] | None = None  # set there: waits for rows on their way back to the table

    def reset_parameters(self) -> None:
        """Gates that change nothing."""
        nn.init.ones_(self.weight)

    def forward(self, ids: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Rows (..., width) of token ids (...), on the device of `ids` wherever the table lies."""
        if self.brought is not None:
            return F.embedding(self.brought.where.of(ids), self.brought.rows)
        if self.before_reading is not None:
            self.before_reading()
        return super().forward(ids.to(self.weight.device)).to(ids.device)

    def gate(self, x: Tensor, ids: Tensor) -> Tensor:
        """x (..., width) times the rows of token ids (...), in the dtype of x."""
        if self.brought is not None and self.brought.where.by_kernel:
            return gate_rows(x, self.brought.rows, self.brought.where.places(ids))
        return x * self(ids).to(x.dtype)


def tables_of(model: nn.Module) -> dict[str, DeepEmbed]:
    """The DeepEmbed tables of a model, by the names of their modules."""
    return {name: part for name, part in model.named_modules() if isinstance(part, DeepEmbed)}


class Lookup(NamedTuple):
    """What tables are looked up with: a run of tokens, as ids and as the network's first activations."""

    ids: Tensor  # (B, T) int64
    embedded: Tensor  # (B, T, C), after ln0

    def detached(self) -> Lookup:
        """The same without a gradient of `embedded`, for tables that look up ids alone."""
        return Lookup(self.ids, self.embedded.detach())

    def last(self, n: int) -> Lookup:
        """The last `n` tokens."""
        if n == self.ids.shape[1]:
            # These very ids, by which Where knows what it has looked up. The view has the gradients of each use summed
            # by themselves first, as those of a slice are: so runs that have begun go on bit for bit.
            return Lookup(self.ids, self.embedded.view_as(self.embedded))
        return Lookup(self.ids[:, -n:], self.embedded[:, -n:])


def rows(table: DeepEmbed, of_embedding: nn.Linear, tokens: Lookup) -> Tensor:
    """Rows (B, T, width) of ``table + embedded of_embedding^T``, in at least fp32.

    Upstream adds the second part to the table once, when it loads a file; apart, both train. Half precision would lose
    what the small part adds to the large one.
    """
    dtype = torch.promote_types(tokens.embedded.dtype, torch.float32)
    if not is_plain(of_embedding, nn.Linear):
        return table(tokens.ids).to(dtype) + of_embedding(tokens.embedded).to(dtype)
    with torch.autocast(tokens.embedded.device.type, enabled=False):
        return table(tokens.ids).to(dtype) + tokens.embedded.to(dtype) @ of_embedding.weight.to(dtype).t()
