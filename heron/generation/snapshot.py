"""A snapshot of a sequence, and its file: safetensors with the fingerprint of the model that made it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from heron.checkpoint.architecture import is_finite
from heron.checkpoint.formats import safetensors
from heron.config import ModelConfig
from heron.errors import CheckpointError, ConfigError
from heron.files import new_file
from heron.model import State

_FORMAT = "heron state 1"


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Everything that decides what a sequence says next. Any number of sequences can go on from it.

    A prompt cache is a snapshot with a `state` and perhaps `pending` ids alone.
    """

    state: State | None
    """What was read, batch size 1, on any device; None: nothing."""
    pending: tuple[int, ...] = ()
    """Ids that are still to be read: the rest of a prompt, or the last token drawn."""
    counts: Tensor | None = None
    """(V,) fp32 decayed occurrences of each token for the penalties, on any device; None: none yet."""
    generator: Tensor | None = None
    """State of the sequence's random generator; None: a seed decides."""

    @property
    def device(self) -> torch.device:
        """Where its state is; the CPU where there is none."""
        return torch.device("cpu") if self.state is None else self.state.layers[0].wkv.device

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(part.nbytes for part in (self.state, self.counts, self.generator) if part is not None)

    def to(self, device: torch.device | str) -> Snapshot:
        """The snapshot with its state and its occurrences on another device."""
        state, counts = self.state and self.state.to(device), None if self.counts is None else self.counts.to(device)
        return dataclasses.replace(self, state=state, counts=counts)


def write_snapshot(snapshot: Snapshot, path: Path, model: str) -> None:
    """Write a snapshot of the model with the fingerprint `model`; CheckpointError as :meth:`heron.Engine.save`."""
    tensors = _tensors(snapshot)
    with new_file(path) as temporary:
        if path.exists() and _format_of(path) != _FORMAT:
            raise CheckpointError(f"{path} exists and is no state file; name another one")
        safetensors.write(tensors, temporary, {"format": _FORMAT, "model": model, "hash": _hash(tensors)})


def hash_of(snapshot: Snapshot) -> str:
    """32 hex digits of every bit of a snapshot."""
    return _hash(_tensors(snapshot))


def read_snapshot(path: Path, model: str, config: ModelConfig, n_ids: int, device: torch.device) -> Snapshot:
    """The snapshot in a file, its state on `device`; CheckpointError as :meth:`heron.Engine.load`.

    Args:
        model, config: fingerprint and sizes of the model that is to go on from it.
        n_ids: of the tokenizer.
    """
    tensors, written_by = _content(path)
    if written_by != model:
        raise CheckpointError(
            f"{path}: this state belongs to another model (fingerprint {written_by}, this one has "
            f"{model}); a state fits only the weights and the dtype that made it"
        )
    names = sorted(name for name in tensors if name.startswith("state."))
    parts = [tensors.pop(name).to(device) for name in names]
    if names != [f"state.{i:04}" for i in range(len(names))] or not all(map(is_finite, parts)):
        raise CheckpointError(f"{path}: damaged: wanted state.0000, state.0001 and so on, all finite")
    _check_rest(path, tensors, n_ids)
    pending = tuple(tensors["pending"].tolist())
    if not all(0 <= token < config.vocab_size for token in pending):
        raise CheckpointError(f"{path}: damaged: pending: wanted ids from 0 to {config.vocab_size - 1}")
    try:
        state = State.from_list(parts) if parts else None
        if state is not None:
            state.check(config, 1)
    except ConfigError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    return Snapshot(state, pending, tensors.get("counts"), tensors.get("generator"))


def _content(path: Path) -> tuple[dict[str, Tensor], str | None]:
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
    if about.get("hash", "") not in ("", _hash(tensors)):  # the first of these files had none
        raise CheckpointError(f"{path}: damaged: its tensors are not those that were written")
    return tensors, about.get("model")


def _tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    """What a state file holds, on the CPU."""
    parts = [] if snapshot.state is None else snapshot.state.to_list()
    tensors = {f"state.{i:04}": part.detach().cpu().clone().contiguous() for i, part in enumerate(parts)}
    tensors["pending"] = torch.tensor(snapshot.pending, dtype=torch.int64)
    for name in ("counts", "generator"):
        if (part := getattr(snapshot, name)) is not None:
            tensors[name] = part.to("cpu", copy=True)
    return tensors


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """32 hex digits of names, dtypes, shapes and numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_rest(path: Path, tensors: dict[str, Tensor], n_ids: int) -> None:
    """CheckpointError unless what lies beside the state in a state file is what :func:`write_snapshot` writes."""
    wanted = {
        "pending": (torch.int64, None),
        "counts": (torch.float32, (n_ids,)),
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
