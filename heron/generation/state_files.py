"""Files of states: a snapshot as safetensors, with the fingerprint of the model that made it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from heron.checkpoint.architecture import is_finite
from heron.checkpoint.formats import safetensors
from heron.errors import CheckpointError
from heron.files import new_file
from heron.generation.requests import Snapshot

_FORMAT = "heron state 1"


def write(snapshot: Snapshot, path: Path, model: str) -> None:
    """Write a snapshot of the model with this fingerprint; CheckpointError as :meth:`Engine.save`."""
    parts = [] if snapshot.state is None else snapshot.state.to_list()
    tensors = {f"state.{i:04}": part.detach().cpu().clone().contiguous() for i, part in enumerate(parts)}
    tensors["pending"] = torch.tensor(snapshot.pending, dtype=torch.int64)
    for name in ("counts", "generator"):
        if (part := getattr(snapshot, name)) is not None:
            tensors[name] = part.clone()
    with new_file(path) as temporary:
        if path.exists() and _format_of(path) != _FORMAT:
            raise CheckpointError(f"{path} exists and is no state file; name another one")
        safetensors.write(tensors, temporary, {"format": _FORMAT, "model": model})


def read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """What a state file holds, unchecked, and the fingerprint of its model; CheckpointError for any other file."""
    try:
        tensors, about = safetensors.read(path), safetensors.metadata(path)
    except CheckpointError as error:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file") from None
        reason = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path}: not a readable state file: {reason}") from None
    if about.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: wanted a state file ({_FORMAT}), got {about.get('format')!r}")
    return tensors, about.get("model")


def take_state(path: Path, tensors: dict[str, Tensor], device: torch.device) -> list[Tensor]:
    """The tensors of the state, onto `device` and out of `tensors`; CheckpointError unless all are there and finite."""
    names = sorted(name for name in tensors if name.startswith("state."))
    parts = [tensors.pop(name).to(device) for name in names]
    if names != [f"state.{i:04}" for i in range(len(names))] or not all(map(is_finite, parts)):
        raise CheckpointError(f"{path}: damaged: wanted state.0000, state.0001 and so on, all finite")
    return parts


def check_rest(path: Path, tensors: dict[str, Tensor], vocab_size: int) -> None:
    """CheckpointError unless what lies beside the state in a state file is what :func:`write` writes."""
    wanted = {
        "pending": (torch.int64, None),
        "counts": (torch.float32, (vocab_size,)),
        "generator": (torch.uint8, tuple(torch.Generator().get_state().shape)),
    }
    for name, tensor in tensors.items():
        dtype, shape = wanted.get(name, (None, None))
        fits = tensor.dim() == 1 if shape is None else tuple(tensor.shape) == shape
        if tensor.dtype != dtype or not fits or not is_finite(tensor):
            raise CheckpointError(f"{path}: damaged: {name} is {tuple(tensor.shape)} {tensor.dtype}")
    if "pending" not in tensors:
        raise CheckpointError(f"{path}: tensor pending is missing")


def _format_of(path: Path) -> str | None:
    """What a file says it is, where it is a safetensors file that can be read."""
    try:
        return safetensors.metadata(path).get("format")
    except CheckpointError:
        return None
