"""Rows of DeepEmbed tables that were trained beside an adapter: a file beside the adapter's, without all other rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from heron.checkpoint.formats import safetensors
from heron.errors import CheckpointError
from heron.files import sha256
from heron.model.deep_embed import tables_of

FILE = "table_rows.safetensors"
_IDS = "ids"


class TableRows(NamedTuple):
    """Some rows of every DeepEmbed table of a model.

    Attributes:
        ids: (n,) int64, ascending: the tokens whose rows they are.
        tables: (n, width) by the name of each table, as in the model's state_dict().
    """

    ids: Tensor
    tables: Mapping[str, Tensor]


def rows_of(model: nn.Module, ids: Tensor) -> TableRows:
    """Copies of the rows of token ids (n,), on the host."""
    tables = _tables(model).items()
    return TableRows(ids, {name: table.detach()[ids.to(table.device)].cpu() for name, table in tables})


@torch.no_grad()
def put_rows(model: nn.Module, rows: TableRows, source: object) -> None:
    """Write rows into the tables of `model`, rounded to their dtype.

    Args:
        source: named in errors.

    Raises:
        CheckpointError: another model's tables, and ids or shapes that do not fit these.
    """
    tables = _tables(model)
    if odd := sorted(tables.keys() ^ rows.tables.keys()):
        where = "this model and not the file" if odd[0] in tables else "the file and not this model"
        raise CheckpointError(f"{source}: {odd[0]} is a table of {where}: made for another one")
    for name, table in tables.items():
        part, wanted = rows.tables[name], (len(rows.ids), table.shape[1])
        if tuple(part.shape) != wanted:
            raise CheckpointError(f"{source}: {name}: wanted {wanted} on this model, got {tuple(part.shape)}")
        if len(rows.ids) and not 0 <= int(rows.ids.min()) <= int(rows.ids.max()) < len(table):
            raise CheckpointError(f"{source}: {_IDS}: wanted 0 to {len(table) - 1}, got others: made for another model")
    for name, table in tables.items():
        table[rows.ids.to(table.device)] = rows.tables[name].to(table.device, table.dtype)


def write(rows: TableRows, path: Path, about: dict[str, str]) -> str:
    """Write rows with `about` as metadata; gives the sha256 of the file."""
    safetensors.write({_IDS: rows.ids, **{name: part.contiguous() for name, part in rows.tables.items()}}, path, about)
    return sha256(path)


def read(path: Path) -> TableRows:
    """The rows in a file.

    Raises:
        CheckpointError: it is damaged; its ids are missing, or do not ascend.
    """
    tensors = safetensors.read(path)
    ids = tensors.pop(_IDS, None)
    if ids is None or ids.dtype != torch.int64 or ids.dim() != 1 or bool((ids.diff() <= 0).any()):
        raise CheckpointError(f"{path}: {_IDS}: wanted token ids (n,) int64, ascending")
    return TableRows(ids, tensors)


def _tables(model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.weight": table.weight for name, table in tables_of(model).items()}
