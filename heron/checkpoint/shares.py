"""Tables of which several processes have the rows, in a checkpoint: each writes a file of its own share.

Row i of a table is row i // W of the share of process i mod W. So any number of processes takes its rows from the files
of any other number, which are mapped: what is not taken is not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from heron.checkpoint.formats import safetensors
from heron.checkpoint.writer import Writer, serialized
from heron.dist import Ranks
from heron.errors import CheckpointError
from heron.optim import RowAdamW

FOLDER = "tables"  # in that of a checkpoint

_FILE = re.compile(rf"{FOLDER}/rows-\d{{5}}-of-(\d{{5}})\.safetensors")
_MODEL, _OPTIMIZER = "model.", "optimizer."  # what names in these files begin with


def split(
    weights: dict[str, Tensor], moments: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Take the rows that this process has out of a model's tensors and those of its optimizer; gives them by name."""
    return {
        f"{prefix}{key}": tensors.pop(key)
        for prefix, tensors in ((_MODEL, weights), (_OPTIMIZER, moments))
        for key in _of_owners(tensors, optimizer)
    }


def take(
    folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Put the rows that this process is to have into what was read of a checkpoint's other files.

    There they take the place of whole tables; of tables in shares nothing is there before.
    """
    found = read(folder)
    owners = optimizer.tables.owners if isinstance(optimizer, RowAdamW) else None
    place = (0, 1) if owners is None else owners.place
    for prefix, tensors in ((_MODEL, weights), (_OPTIMIZER, moments)):
        parts = {key: [tensors[key]] for key in _of_owners(tensors, optimizer)}
        parts |= {key.removeprefix(prefix): part for key, part in found.items() if key.startswith(prefix)}
        for key, of_table in parts.items():
            tensors[key] = taken(of_table, *place)


def whole_tables(folder: Path) -> dict[str, Tensor]:
    """The model's tables by name, in a verified checkpoint of several processes; none in any other."""
    return {name.removeprefix(_MODEL): taken(parts) for name, parts in read(folder).items() if name.startswith(_MODEL)}


def files_among(names: Iterable[str]) -> list[str]:
    """The files of shares that a manifest must list which lists `names`: one for each process, or none."""
    counts = {int(found[1]) for found in map(_FILE.fullmatch, names) if found}
    return [_file(rank, count) for count in counts for rank in range(count)]


def write(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, dict[str, object]]:
    """Write this process's share into the folder of a checkpoint; gives what a manifest says of the file.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        (folder / FOLDER).mkdir(exist_ok=True)
        with Writer(folder) as writer:
            writer.write(_file(ranks.rank, ranks.count), serialized(dict(tensors)))
            return writer.files()
    except OSError as error:
        raise CheckpointError(f"{folder}: rank {ranks.rank} cannot write its rows: {error.strerror}") from error


def read(folder: Path) -> dict[str, list[Tensor]]:
    """The shares of all processes by the name of the tensor, in order, mapped; none in a checkpoint without them.

    Raises:
        CheckpointError: a file cannot be read, or lacks what another has.
    """
    files = [safetensors.mapped(path) for path in sorted((folder / FOLDER).glob("*"))]
    names = files[0].keys() if files else ()
    if any(file.keys() != names for file in files):
        raise CheckpointError(f"{folder / FOLDER}: its files hold different tensors; they are of different checkpoints")
    return {name: [file[name] for file in files] for name in names}


def taken(shares: Sequence[Tensor], rank: int = 0, count: int = 1) -> Tensor:
    """Rows `rank`, `rank + count`, ... of a table, all of them by default, in memory of their own.

    Args:
        shares: of however many processes; a whole table is the share of one.
    """
    W, n_rows = len(shares), sum(map(len, shares))
    wanted = torch.arange(rank, n_rows, count)
    rows = shares[0].new_empty(len(wanted), *shares[0].shape[1:])
    for owner, share in enumerate(shares):
        here = (wanted % W == owner).nonzero().flatten()
        rows[here] = share[wanted[here] // W]
    return rows


def _of_owners(names: Iterable[str], optimizer: torch.optim.Optimizer) -> list[str]:
    """Of names of weights, or of what an optimizer keeps of them, those of tables whose rows several processes have."""
    if not isinstance(optimizer, RowAdamW) or optimizer.tables.owners is None:
        return []
    return [name for name in names if name.endswith(tuple(optimizer.tables.names))]


def _file(rank: int, count: int) -> str:
    return f"{FOLDER}/rows-{rank + 1:05d}-of-{count:05d}.safetensors"
