"""The tensors of a network that several processes share: each writes its part, and reads the part that it needs.

torch.distributed.checkpoint finds out which part that is, for any number of processes. Its files here are safetensors:
its own format holds pickles, which must not be read from a file that anybody could have made.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed

from heron.checkpoint.writer import Writer, serialized
from heron.dist import is_sharded, local
from heron.errors import CheckpointError

FOLDER = "dcp"  # in that of a checkpoint

_MODEL, _OPTIMIZER = "model.", "optimizer."  # what names begin with


def is_file(name: str) -> bool:
    """Whether a manifest's name is that of a file of shards."""
    return re.fullmatch(rf"{FOLDER}/shard-\d{{5}}-model-\d{{5}}-of-\d{{5}}\.safetensors", name) is not None


class Part(NamedTuple):
    """What a process writes."""

    number: int
    """Of its file."""
    offsets: Mapping[str, Sequence[int]]
    """Where its part of a tensor begins in the whole one, of each of which it has some, by name."""


_parts: dict[Any, Part] = {}  # of the last tensors, by what they are


def part_of(folder: Path, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], group: Any) -> Part:
    """This process's part of tensors that are to be written into `folder`. All processes of `group` call it.

    It is found out once for tensors of the same names, shapes and places: that takes a second of Python, during which a
    step beside it would come to a standstill.

    Raises:
        CheckpointError: in all processes, where one could not find it out.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save

    class Asked(HuggingFaceStorageWriter):
        """Is told what to write, and writes nothing: PyTorch's own holds Python's lock for a third of the time."""

        def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[Any]]:
            offsets = {item.index.fqn: item.tensor_data.chunk.offsets for item in plan.items}  # pyright: ignore[reportOptionalMemberAccess]
            _parts[what] = Part(plan.storage_data["shard_index"], offsets)
            done = torch.futures.Future()
            done.set_result([])
            return done

    tensors = _joined(model, optimizer)
    what = (distributed.get_world_size(group), *map(_placed, tensors.items()))
    if what not in _parts:
        _parts.clear()
        try:
            save(tensors, storage_writer=Asked(str(folder / FOLDER), save_distributed=True), process_group=group)
        except CheckpointException as error:  # no Exception
            _parts.clear()
            rank, (cause, _) = min(error.failures.items())
            raise CheckpointError(f"{folder}: rank {rank} does not know its part: {cause}") from None
    return _parts[what]


def write(writer: Writer, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], part: Part) -> None:
    """Write this process's part into the folder of a checkpoint.

    Raises:
        CheckpointError: it cannot be written.
    """
    if not part.offsets:
        return
    tensors = _joined(model, optimizer)
    where = {name: {"saved_offsets": offsets} for name, offsets in part.offsets.items()}
    described = {"DCP_SHARDING_INFO": json.dumps(where), "DCP_VERSION": "1.0"}  # as its reader wants it
    try:
        (writer.folder / FOLDER).mkdir(exist_ok=True)
        name = f"{FOLDER}/shard-{part.number:05d}-model-00001-of-00001.safetensors"
        writer.write(name, serialized({name: local(tensors[name]) for name in part.offsets}, described))
    except OSError as error:
        raise CheckpointError(f"{writer.folder}: cannot write shard {part.number}: {error}") from error


def _placed(named: tuple[str, Tensor]) -> tuple[Any, ...]:
    """What decides who writes a tensor, and which part of it."""
    name, tensor = named
    spread = (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None  # pyright: ignore[reportAttributeAccessIssue]
    return name, tensor.shape, tensor.dtype, spread


def described(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the model and of the optimizer by name, without contents.

    Raises:
        CheckpointError: the files cannot be read.
    """
    found = {name: _like(kept) for name, kept in _reader(folder)[1].items()}
    of_model = {name.removeprefix(_MODEL): tensor for name, tensor in found.items() if name.startswith(_MODEL)}
    of_optimizer = {
        name.removeprefix(_OPTIMIZER): tensor for name, tensor in found.items() if name.startswith(_OPTIMIZER)
    }
    return of_model, of_optimizer


def read(folder: Path, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
    """Fill tensors, whole ones or shards, with what :func:`described` has of these names and shapes."""
    from torch.distributed.checkpoint.state_dict_loader import load

    reader, _ = _reader(folder)
    with warnings.catch_warnings():  # that this process reads without the others
        warnings.simplefilter("ignore")
        load(_joined(model, optimizer), storage_reader=reader, no_dist=True)


def read_model(folder: Path) -> dict[str, Tensor]:
    """The whole tensors of the model by name."""
    of_model, _ = described(folder)
    tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in of_model.items()}
    read(folder, tensors, {})
    return tensors


def _joined(model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> dict[str, Any]:
    of_model = {f"{_MODEL}{name}": tensor for name, tensor in model.items()}
    return of_model | {f"{_OPTIMIZER}{name}": tensor for name, tensor in optimizer.items()}


def _reader(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    """What reads the files, and what these say of each tensor."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    try:
        return reader, reader.read_metadata().state_dict_metadata
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{folder}: not readable as shards: {error}") from None


def _like(kept: Any) -> Tensor:
    return torch.empty(kept.size, dtype=kept.properties.dtype, device="meta")
