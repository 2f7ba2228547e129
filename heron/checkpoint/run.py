"""Checkpoints of a run: weights, optimizer, random generators and position, written whole, verified when read.

A checkpoint is a folder `checkpoints/step-00001000/`. Its `manifest.json`, written last, holds the size and sha256 of
every other file, and its own; a folder without a manifest that fits is not a checkpoint. `seq` in the manifest counts
the saves of a run: the newest checkpoint is the one with the largest, whatever its step. Of a sharded network each
process writes its part, into `dcp/` (:mod:`heron.checkpoint.sharded`), of tables its rows, into `tables/`
(:mod:`heron.checkpoint.shares`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from heron import dist, files
from heron.checkpoint import rng, sharded, shares
from heron.checkpoint.formats import safetensors
from heron.checkpoint.writer import Writer, serialized
from heron.errors import CheckpointError
from heron.locks import locked
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
_SMALL_FILES = 1 << 17  # bytes that are allowed for what is not a tensor

_whole: dict[Path, list[tuple[str, int, int]]] = {}  # folder -> what its files looked like when it was verified


class Contents(NamedTuple):
    """What a checkpoint is to hold."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # by file and name; those of a sharded network in every process
    tables: dict[str, Tensor]  # the rows that each process has
    trainer: bytes
    config: bytes

    @property
    def sharded(self) -> bool:
        """Whether each process has a part of the tensors."""
        return any(map(dist.is_sharded, self.tensors[MODEL].values()))

    @property
    def n_bytes(self) -> int:
        """About how much room they need."""
        tensors = (tensor for part in (*self.tensors.values(), self.tables) for tensor in part.values())
        return _SMALL_FILES + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
    """:func:`write` the :func:`contents`."""
    return write(run_folder, contents(step, model, optimizer, trainer, config_yaml), keep, ranks)


def contents(
    step: int, model: nn.Module, optimizer: torch.optim.Optimizer, trainer: dict[str, Any], config_yaml: str
) -> Contents:
    """What a checkpoint is to hold. The tensors of model and optimizer are these themselves, no copies.

    Args:
        trainer: what else the loop must know to go on, as JSON values; it holds "step".
    """
    weights, moments = model.state_dict(), _optimizer_tensors(model, optimizer)
    tables = shares.split(weights, moments, optimizer)
    record = json.dumps(trainer, indent=1, allow_nan=False).encode()
    tensors = {MODEL: weights, OPTIMIZER: moments, RNG: rng.tensors()}
    return Contents(step, tensors, tables, record, config_yaml.encode())


def write(run_folder: Path, contents: Contents, keep: int, ranks: dist.Ranks = dist.ALONE) -> Path:
    """Write `checkpoints/step-<step>`, then delete what is older than the newest `keep` whole ones.

    All processes of a run call it. The first one writes, or, of a sharded network and of tables whose rows several
    have, each writes its part; any number of processes, with shards or without, can go on from either. A name that is
    taken is left alone: the new folder's then ends in 8 random digits.

    Returns:
        The new folder.

    Raises:
        CheckpointError: the folder cannot be written; older checkpoints are untouched, and the message says how many
            bytes are needed and free. In every process: another's failure is a HeronError.
    """
    if contents.sharded or contents.tables:
        return _write_parts(run_folder, contents, keep, ranks)
    return ranks.first(lambda: _write(run_folder, contents, keep))


def _write(run_folder: Path, contents: Contents, keep: int) -> Path:
    with _new(run_folder, contents, keep) as (folder, writer):
        for name, part in contents.tensors.items():
            writer.write(name, serialized(part))
        _write_small(writer, contents)
    return folder


def _write_parts(run_folder: Path, contents: Contents, keep: int, ranks: dist.Ranks) -> Path:
    """The same by all processes. One that fails fails them all, and the folder never gets its name."""
    with contextlib.ExitStack() as stack:
        begun: list[tuple[Path, Writer]] = []

        def begin() -> Path:
            begun.append(stack.enter_context(_new(run_folder, contents, keep)))
            return begun[0][1].folder

        def end() -> Path:
            folder, writer = begun[0]
            writer.add({name: entry for files_of_one in written for name, entry in files_of_one.items()})
            for name in (RNG,) if contents.sharded else contents.tensors:
                writer.write(name, serialized(contents.tensors[name]))
            _write_small(writer, contents)
            stack.close()
            return folder

        def write_mine() -> dict[str, Any]:
            if part is not None:
                sharded.write(mine, contents.tensors[MODEL], contents.tensors[OPTIMIZER], part)
            return mine.files() | (shares.write(temporary, contents.tables, ranks) if contents.tables else {})

        temporary = ranks.first(begin)
        mine, part = stack.enter_context(Writer(temporary)), None
        if contents.sharded:
            of_run = contents.tensors[MODEL], contents.tensors[OPTIMIZER]
            part = sharded.part_of(temporary, *of_run, ranks.connection)
        written = ranks.each(write_mine)
        return ranks.first(end)


def _write_small(writer: Writer, contents: Contents) -> None:
    writer.write(TRAINER, [contents.trainer])
    writer.write(CONFIG, [contents.config])


@contextlib.contextmanager
def _new(run_folder: Path, contents: Contents, keep: int) -> Iterator[tuple[Path, Writer]]:
    """A new checkpoint's folder, and what writes its files elsewhere: at the end they are sealed, and get that name."""
    parent = run_folder / "checkpoints"
    files.sweep(parent)
    older = _folders(run_folder)
    folder = parent / f"step-{contents.step:08d}"
    if folder.exists():
        folder = folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        with files.new_folder(folder) as temporary, Writer(temporary) as writer:
            yield folder, writer
            manifest = {
                "format": FORMAT,
                "step": contents.step,
                "seq": 1 + max((_sequence(other) for other in older), default=0),
                "parent": older[0].name if older else None,
                "files": writer.files(),
            }
            writer.write(MANIFEST, [_sealed(manifest)])
            for inside in (path for path in temporary.iterdir() if path.is_dir()):
                files.sync(inside)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. A checkpoint needs {contents.n_bytes:,} bytes, {_free(run_folder)} are free; every older one is "
            "as it was. Make room and run the same command again"
        ) from error
    _whole[folder] = _looks(folder)
    _discard_beyond(keep, run_folder)


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
        if files.sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path}: its sha256 is not the manifest's; the file was damaged or changed")
    for path in (path for of_parts in (sharded.FOLDER, shares.FOLDER) for path in (folder / of_parts).glob("*")):
        if f"{path.parent.name}/{path.name}" not in manifest["files"]:
            raise CheckpointError(f"{path}: the manifest does not list it; take it away")
    _whole[folder] = _looks(folder)


@contextlib.contextmanager
def lock(run_folder: Path) -> Iterator[None]:
    """Own a run folder while inside; CheckpointError when another process does. The kernel frees it if we die."""
    with open(run_folder / "run.lock", "a", encoding="utf-8") as file:
        if not locked(file):
            raise CheckpointError(f"{run_folder}: another process is training here; name another --out")
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
    shards = folder / sharded.FOLDER
    if shards.is_dir():
        of_model, of_optimizer = shards, shards
        weights, moments = sharded.described(shards)
    else:
        of_model, of_optimizer = folder / MODEL, folder / OPTIMIZER
        weights, moments = safetensors.mapped(of_model), safetensors.mapped(of_optimizer)
    shares.take(folder, weights, moments, optimizer)
    check_names(of_model, weights, model.state_dict())
    for name, parameter in model.state_dict().items():
        if weights[name].shape != parameter.shape:
            raise CheckpointError(
                f"{of_model}: {name} must be {tuple(parameter.shape)}, got {tuple(weights[name].shape)}"
            )
    in_shards = {}
    for name, parameter in model.state_dict().items():
        if weights[name].is_meta:
            in_shards[name] = parameter
        else:
            dist.local(parameter).copy_(dist.local(dist.spread(weights[name], parameter)))
    room = _restore_optimizer(of_optimizer, moments, model, optimizer)
    if of_model == shards:
        sharded.read(shards, in_shards, room)
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
    shards = [name for name in manifest["files"] if sharded.is_file(name)]
    parts = (*(shards or (MODEL, OPTIMIZER)), *shares.files_among(manifest["files"]))
    check_names(path, manifest["files"], (*parts, RNG, TRAINER, CONFIG))
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
    entries = [(str(path), path.stat()) for path in folder.rglob("*")]
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in entries)


def _free(run_folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(run_folder).free:,}"
    except OSError:
        return "an unknown number"


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    if isinstance(optimizer, RowAdamW):
        optimizer.tables.wait()
    for name in _trained(model, optimizer):
        state = optimizer.state.get(model.get_parameter(name)) or {_UNUSED: torch.zeros(0)}
        tensors |= {f"{part}.{name}": value for part, value in state.items()}
    return tensors


def _restore_optimizer(
    path: Path, tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Give the optimizer what was kept of it; of shards, which are read later, room for it, which is returned."""
    wanted = [
        f"{part}.{name}"
        for name, parts in _trained(model, optimizer).items()
        for part in ((_UNUSED,) if f"{_UNUSED}.{name}" in tensors else parts)
    ]
    check_names(path, tensors, wanted)
    optimizer.state.clear()
    room = {}
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        parameter = model.get_parameter(name)
        if part == _UNUSED:
            continue
        shape = {"step": (), "row_step": parameter.shape[:1]}.get(part, parameter.shape)
        if value.shape != shape:
            raise CheckpointError(f"{path}: {key} must be {tuple(shape)}, got {tuple(value.shape)}")
        if not value.is_meta:
            state = dist.spread(value.clone(), parameter)
        elif value.shape == parameter.shape:
            state = room[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        else:
            state = room[key] = torch.empty_like(value, device=parameter.device)
        optimizer.state[parameter][part] = state
    return room


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[str, ...]]:
    """Names of the parameters that the optimizer has, and of what it keeps of each."""
    kept = {id(parameter): _ADAMW for group in optimizer.param_groups for parameter in group["params"]}
    if isinstance(optimizer, RowAdamW):
        kept |= {id(weight): RowAdamW.STATE for weight in optimizer.tables.weights}
    return {name: kept[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in kept}
