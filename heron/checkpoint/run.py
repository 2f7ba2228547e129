"""Checkpoints of a run: weights, optimizer, random generators and position, written whole, verified when read.

A checkpoint is a folder `checkpoints/step-00001000/`. Its `manifest.json`, written last, holds the size and sha256 of
every other file; a folder without a manifest that fits is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed there
    fcntl = None

from heron.checkpoint.atomic import new_folder, sync
from heron.checkpoint.formats import safetensors
from heron.errors import CheckpointError

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
TRAINER = "trainer.json"
MANIFEST = "manifest.json"
FORMAT = 1


def save(
    run_folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainer: dict[str, Any],
    config_yaml: str,
    keep: int,
) -> Path:
    """Write `checkpoints/step-<step>` and delete the oldest beyond `keep`. Returns the new folder.

    Args:
        trainer: what else the loop must know to go on, as JSON values; it holds "step".

    Raises:
        CheckpointError: the step has a whole checkpoint already (a damaged one is replaced), or the folder cannot be
            written; older checkpoints are untouched.
    """
    folder = run_folder / "checkpoints" / f"step-{step:08d}"
    if folder.exists():
        if _is_whole(folder):
            raise CheckpointError(f"{folder}: exists already; a checkpoint is never overwritten")
        _discard(folder)
    with new_folder(folder) as temporary:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        safetensors.write(weights, temporary / MODEL)
        safetensors.write(_optimizer_tensors(model, optimizer), temporary / OPTIMIZER)
        safetensors.write(_rng_tensors(), temporary / RNG)
        (temporary / TRAINER).write_text(json.dumps(trainer, indent=1), encoding="utf-8")
        (temporary / "config.yaml").write_text(config_yaml, encoding="utf-8")
        files = {}
        for path in sorted(temporary.iterdir()):
            sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        manifest = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1)
        (temporary / MANIFEST).write_text(manifest, encoding="utf-8")
        sync(temporary / MANIFEST)
    older = [other for other in _folders(run_folder) if other.name < folder.name]  # a newer one is damaged
    for old in older[keep - 1 :]:
        _discard(old)
    for rest in (*folder.parent.glob(".tmp-*"), *folder.parent.glob(".trash-*")):  # of a process that was killed
        shutil.rmtree(rest)
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
        raise CheckpointError(f"{run_folder}: no checkpoint is whole: {'; '.join(rejected)}")
    return None


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest (CheckpointError names the file that differs)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        found = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: missing or damaged: {error}") from None
    if found != FORMAT:
        raise CheckpointError(f"{folder}: wanted checkpoint format {FORMAT}, got {found}")
    for name in (MODEL, OPTIMIZER, RNG, TRAINER):
        if name not in files:
            raise CheckpointError(f"{folder}: its manifest does not list {name}")
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though the manifest lists it")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path}: wanted {size} bytes, got {path.stat().st_size}")
        if _sha256(path) != digest:
            raise CheckpointError(f"{path}: its sha256 is not the manifest's; the file was damaged or changed")


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
        CheckpointError: the optimizer's tensors are not those of this model.
    """
    model.load_state_dict(safetensors.read(folder / MODEL))
    _restore_optimizer(folder / OPTIMIZER, model, optimizer)
    _restore_rng(safetensors.read(folder / RNG))
    return trainer_of(folder)


def _folders(run_folder: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    return sorted((run_folder / "checkpoints").glob("step-*"), reverse=True)


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


def _discard(folder: Path) -> None:
    trash = folder.with_name(f".trash-{folder.name}")  # so that a half-deleted folder never has a valid name
    folder.rename(trash)
    shutil.rmtree(trash)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for part, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in safetensors.read(path).items():
        part, name = key.split(".", 1)
        if name not in parameters or value.dim() and value.shape != parameters[name].shape:
            raise CheckpointError(f"{path}: {key} {tuple(value.shape)} has no parameter of that name and shape")
        optimizer.state[parameters[name]][part] = value.to(parameters[name].device)


def _rng_tensors() -> dict[str, Tensor]:
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    if version != 3 or name != "MT19937":
        raise CheckpointError(f"unknown random generators: python version {version}, numpy {name}")
    return {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        **{f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())},
    }


def _restore_rng(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["torch"])
    gauss = tensors["python_gauss"].tolist()
    random.setstate((3, tuple(tensors["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = tensors["numpy_position"].tolist()
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, tensors["numpy_gauss"].item()))
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
