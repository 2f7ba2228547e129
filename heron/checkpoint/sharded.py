"""The tensors of a network that several processes share: each writes its part, and reads the part that it needs.

torch.distributed.checkpoint finds out which part that is, for any number of processes. Its files here are safetensors:
its own format holds pickles, which must not be read from a file that anybody could have made.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from heron.checkpoint.writer import Writer, serialized
from heron.errors import CheckpointError

FOLDER = "dcp"  # in that of a checkpoint

_MODEL, _OPTIMIZER = "model.", "optimizer."  # what names begin with


def is_file(name: str) -> bool:
    """Whether a manifest's name is that of a file of shards."""
    return re.fullmatch(rf"{FOLDER}/shard-\d{{5}}-model-\d{{5}}-of-\d{{5}}\.safetensors", name) is not None


def write(writer: Writer, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], group: Any) -> None:
    """Write this process's parts into the folder of a checkpoint. All processes of `group` call it.

    Raises:
        CheckpointError: in all processes, where one could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    (writer.folder / FOLDER).mkdir(exist_ok=True)
    try:
        save(_joined(model, optimizer), storage_writer=_storage(writer), process_group=group)
    except CheckpointException as error:  # no Exception
        rank, (cause, _) = min(error.failures.items())
        raise CheckpointError(f"{writer.folder}: rank {rank} cannot write its part: {cause}") from None


def _storage(writer: Writer) -> Any:
    """What writes the files. PyTorch's own would hold Python's lock for a third of the time, and training up."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

    class Storage(HuggingFaceStorageWriter):
        def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[Any]]:
            tensors: dict[str, Tensor] = {item.index.fqn: planner.resolve_data(item) for item in plan.items}  # pyright: ignore[reportAssignmentType]
            where = {item.index.fqn: {"saved_offsets": item.tensor_data.chunk.offsets} for item in plan.items}  # pyright: ignore[reportOptionalMemberAccess]
            described = {"DCP_SHARDING_INFO": json.dumps(where), "DCP_VERSION": "1.0"}  # as its reader wants it
            if tensors:
                name = f"{FOLDER}/shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
                writer.write(name, serialized(tensors, described))
            done = torch.futures.Future()
            done.set_result([])
            return done

    return Storage(str(writer.folder / FOLDER), save_distributed=True)


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
