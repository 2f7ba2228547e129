"""Checkpoints of a run: weights, optimizer, random generators and position, written whole, verified when read.

A checkpoint is a folder `checkpoints/step-00001000/`. Its `manifest.json`, written last, holds the size and sha256 of
every other file, and its own; a folder without a manifest that fits is not a checkpoint. `seq` in the manifest counts
the saves of a run: the newest checkpoint is the one with the largest, whatever its step.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed there
    fcntl = None

from heron import dist, files
from heron.checkpoint import rng
from heron.checkpoint.formats import safetensors
from heron.errors import CheckpointError
from heron.optim import RowAdamW

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
TRAINER = "trainer.json"
CONFIG = "config.yaml"
MANIFEST = "manifest.json"
FORMAT = 2

_ADAMW = ("step", "exp_avg", "exp_avg_sq")  # what it keeps of a parameter
_UNUSED = "unused"  # stands for them where a parameter has had no gradient yet
_NAMES = {dtype: name for name, dtype in safetensors.DTYPES.items()}
_SMALL = 1 << 20  # bytes that are put together before they are handed on
_BACKLOG = 1 << 28  # bytes that may be written but not hashed yet
_SMALL_FILES = 1 << 17  # bytes that are allowed for what is not a tensor

_whole: dict[Path, list[tuple[str, int, int]]] = {}  # folder -> what its files looked like when it was verified


def save(
    run_folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainer: dict[str, Any],
    config_yaml: str,
    keep: int,
    ranks: dist.Ranks = dist.ALONE,
) -> Path:
    """Write `checkpoints/step-<step>`, then delete what is older than the newest `keep` whole ones.

    All processes of a run call it, and the first one writes: whole tensors, put together on its host, so that any
    number of processes, with shards or without, can go on from them. A name that is taken is left alone: the new
    folder's then ends in 8 random digits.

    Args:
        trainer: what else the loop must know to go on, as JSON values; it holds "step".

    Returns:
        The new folder.

    Raises:
        CheckpointError: the folder cannot be written; older checkpoints are untouched, and the message says how many
            bytes are needed and free.
    """
    tensors = {
        MODEL: dist.on_first_host(model.state_dict(), ranks),
        OPTIMIZER: dist.on_first_host(_optimizer_tensors(model, optimizer), ranks),
        RNG: rng.tensors(),
    }
    return ranks.first(lambda: _write(run_folder, step, tensors, trainer, config_yaml, keep))


def _write(
    run_folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    trainer: dict[str, Any],
    config_yaml: str,
    keep: int,
) -> Path:
    parent = run_folder / "checkpoints"
    files.sweep(parent)
    older = _folders(run_folder)
    folder = parent / f"step-{step:08d}"
    if folder.exists():
        folder = folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:8]}")
    parts = {
        **tensors,
        TRAINER: json.dumps(trainer, indent=1, allow_nan=False).encode(),
        CONFIG: config_yaml.encode(),
    }
    needed = _SMALL_FILES + sum(
        tensor.numel() * tensor.element_size()
        for part in parts.values()
        if isinstance(part, dict)
        for tensor in part.values()
    )
    try:
        with files.new_folder(folder) as temporary, _Writer(temporary) as writer:
            for name, part in parts.items():
                writer.write(name, _serialized(part) if isinstance(part, dict) else [part])
            manifest = {
                "format": FORMAT,
                "step": step,
                "seq": 1 + max((_sequence(other) for other in older), default=0),
                "parent": older[0].name if older else None,
                "files": writer.files(),
            }
            writer.write(MANIFEST, [_sealed(manifest)])
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. A checkpoint needs {needed:,} bytes, {_free(run_folder)} are free; every older one is as it "
            "was. Make room and run the same command again"
        ) from error
    _whole[folder] = _looks(folder)
    _discard_beyond(keep, run_folder)
    return folder


def newest(run_folder: Path, say: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint of a run that verifies, or None. Each newer one that does not is told to `say`.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    rejected = []
    for folder in _folders(run_folder):
        try:
            verify(folder)
        except CheckpointError as error:
            rejected.append(str(error))
            if say is not None:
                say(f"passing over a damaged checkpoint: {error}")
            continue
        return folder
    if rejected:
        final = run_folder / "rwkv-final.pth"
        begin = f"; its last weights are whole, to begin with them type --model {final} and another --out"
        raise CheckpointError(
            f"{run_folder}: no checkpoint is whole: {'; '.join(rejected)}{begin if final.is_file() else ''}"
        )
    return None


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest (CheckpointError names the file that differs)."""
    manifest = _manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though the manifest lists it")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{path}: wanted {entry['bytes']} bytes, got {path.stat().st_size}")
        if _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path}: its sha256 is not the manifest's; the file was damaged or changed")
    _whole[folder] = _looks(folder)


@contextlib.contextmanager
def lock(run_folder: Path) -> Iterator[None]:
    """Own a run folder while inside; CheckpointError when another process does. The kernel frees it if we die."""
    with open(run_folder / "run.lock", "a", encoding="utf-8") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"{run_folder}: another process is training here; name another --out") from None
        yield


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, rather than a run."""
    return (folder / MANIFEST).exists()


def trainer_of(folder: Path) -> dict[str, Any]:
    """The trainer's own record in a verified checkpoint."""
    return json.loads((folder / TRAINER).read_text(encoding="utf-8"))


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a verified checkpoint into a model, its optimizer and the random generators; returns the trainer's record.

    Raises:
        CheckpointError: a tensor of the model, the optimizer or the generators is missing, unknown or of another shape.
    """
    weights = safetensors.read(folder / MODEL)
    check_names(folder / MODEL, weights, model.state_dict())
    for name, parameter in model.state_dict().items():
        if weights[name].shape != parameter.shape:
            raise CheckpointError(
                f"{folder / MODEL}: {name} must be {tuple(parameter.shape)}, got {tuple(weights[name].shape)}"
            )
    for name, parameter in model.state_dict().items():
        dist.local(parameter).copy_(dist.local(dist.spread(weights[name], parameter)))
    _restore_optimizer(folder / OPTIMIZER, model, optimizer)
    generators = safetensors.read(folder / RNG)
    check_names(folder / RNG, generators, rng.names(generators))
    rng.restore(generators)
    return trainer_of(folder)


def check_names(path: Path, got: Iterable[str], wanted: Iterable[str]) -> None:
    """CheckpointError unless a saved state consists of exactly the parts that are wanted."""
    got, wanted = set(got), set(wanted)
    problems = [f"{name} is missing" for name in sorted(wanted - got)]
    problems += [f"{name} is not known" for name in sorted(got - wanted)]
    if problems:
        rest = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{path}: {'; '.join(problems[:3])}{rest}; was it saved by another version of Heron?")


def _folders(run_folder: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first; before them those whose manifest cannot tell."""
    return sorted((run_folder / "checkpoints").glob("step-*"), key=_order, reverse=True)


def _order(folder: Path) -> tuple[bool, int, str]:
    sequence = _sequence(folder)
    return sequence == 0, sequence, folder.name


def _sequence(folder: Path) -> int:
    """The number of a save, from 1; 0 where the manifest is missing or damaged."""
    try:
        return _manifest(folder)["seq"]
    except CheckpointError:
        return 0


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, which its own sha256 confirms to the byte."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        found = manifest["format"]
        if found == FORMAT:
            _ = manifest["seq"] + 1, [entry["bytes"] + len(entry["sha256"]) for entry in manifest["files"].values()]
        sealed = _sealed({name: value for name, value in manifest.items() if name != "sha256"})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: missing or damaged: {error}") from None
    if found != FORMAT:
        raise CheckpointError(f"{folder}: wanted checkpoint format {FORMAT}, got {found}")
    if sealed != content:
        raise CheckpointError(f"{path}: its own sha256 does not confirm it; the file was damaged or changed")
    check_names(path, manifest["files"], (MODEL, OPTIMIZER, RNG, TRAINER, CONFIG))
    return manifest


def _sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest as bytes, with the sha256 of what it is while that field is empty."""
    digest = hashlib.sha256(json.dumps({**manifest, "sha256": ""}, indent=1).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1).encode()


def _discard_beyond(keep: int, run_folder: Path) -> None:
    """Delete what is older than the newest `keep` whole checkpoints. One that is not whole does not count."""
    kept = 0
    for folder in _folders(run_folder):
        if kept == keep:
            trash = folder.with_name(f".trash-{folder.name}")  # so that a half-deleted folder never has a valid name
            folder.rename(trash)
            shutil.rmtree(trash)
            _whole.pop(folder, None)
        elif _is_whole(folder):
            kept += 1


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint verifies. One that did and looks the same is not read again."""
    if _whole.get(folder) == _looks(folder):
        return True
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


def _looks(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every file."""
    entries = [(entry.name, entry.stat()) for entry in os.scandir(folder)]
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in entries)


def _free(run_folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(run_folder).free:,}"
    except OSError:
        return "an unknown number"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Writer:
    """Writes files onto the disk, and takes their sha256 in another thread meanwhile."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._behind: collections.deque[tuple[concurrent.futures.Future[None], int]] = collections.deque()
        self._bytes_behind = 0
        self._written: dict[str, tuple[int, Any]] = {}

    def write(self, name: str, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
        """Write a new file and force it onto the disk."""
        digest, size = hashlib.sha256(), 0
        with open(self._folder / name, "xb") as file:
            for piece in pieces:
                self._behind.append((self._pool.submit(digest.update, piece), len(piece)))
                self._bytes_behind += len(piece)
                file.write(piece)
                size += len(piece)
                self._catch_up(_BACKLOG)
            file.flush()
            os.fsync(file.fileno())
        self._written[name] = size, digest

    def files(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of each file written so far."""
        self._catch_up(0)
        return {name: {"bytes": size, "sha256": digest.hexdigest()} for name, (size, digest) in self._written.items()}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def _catch_up(self, allowed: int) -> None:
        """Wait until at most `allowed` written bytes, which stay in memory until then, are still to be hashed."""
        while self._bytes_behind > allowed:
            future, size = self._behind.popleft()
            future.result()
            self._bytes_behind -= size


def _serialized(tensors: dict[str, Tensor]) -> Iterator[bytearray | memoryview]:
    """A .safetensors file piece by piece: no second copy of all the weights is ever made.

    Source of the format: huggingface/safetensors, README. Wide types come first so that each begins at a multiple of
    its size, as the format's readers want it.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    small = bytearray(len(text).to_bytes(8, "little") + text)
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().data
        if len(small) + len(raw) < _SMALL:
            small += raw
            continue
        yield small
        yield raw
        small = bytearray()
    yield small


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    if isinstance(optimizer, RowAdamW):
        optimizer.tables.wait()
    for name in _trained(model, optimizer):
        state = optimizer.state.get(model.get_parameter(name)) or {_UNUSED: torch.zeros(0)}
        tensors |= {f"{part}.{name}": value for part, value in state.items()}
    return tensors


def _restore_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = safetensors.read(path)
    wanted = [
        f"{part}.{name}"
        for name, parts in _trained(model, optimizer).items()
        for part in ((_UNUSED,) if f"{_UNUSED}.{name}" in tensors else parts)
    ]
    check_names(path, tensors, wanted)
    optimizer.state.clear()
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        parameter = model.get_parameter(name)
        if part == _UNUSED:
            continue
        shape = {"step": (), "row_step": parameter.shape[:1]}.get(part, parameter.shape)
        if value.shape != shape:
            raise CheckpointError(f"{path}: {key} must be {tuple(shape)}, got {tuple(value.shape)}")
        optimizer.state[parameter][part] = dist.spread(value, parameter)


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[str, ...]]:
    """Names of the parameters that the optimizer has, and of what it keeps of each."""
    kept = {id(parameter): _ADAMW for group in optimizer.param_groups for parameter in group["params"]}
    if isinstance(optimizer, RowAdamW):
        kept |= {id(weight): RowAdamW.STATE for weight in optimizer.tables.weights}
    return {name: kept[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in kept}
