"""What in a folder a run may write over: what it wrote itself, and nothing else.

`run.lock` holds the record: its first line says that a run has begun here, when nothing of another program was in the
way; the others are about weights files: that one is being written, or the size and the hash of one that was. A weights
file that fits none of these lines is not the run's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from heron.errors import CheckpointError

LOCK = "run.lock"
INIT, FINAL = "rwkv-init.pth", "rwkv-final.pth"
_BEGUN, _PENDING = "a run of heron", "is being written"
_WRITTEN = (
    "config.yaml", "run_status.json", "log.jsonl", "train_log.txt", "loss.png", "tokenizer.json", "samples", "bad",
    "checkpoints", "tensorboard", "adapter", "state.pth", "reference.json", FINAL,
)  # fmt: skip
_END_BYTES = 1 << 20  # of each end of a file; that of a .pth holds a checksum of every tensor


def has_begun(folder: Path) -> bool:
    """Whether a folder is that of a run of Heron's, be it one that was stopped before its first step."""
    if _record(folder) or any((folder / "checkpoints").glob("step-*/manifest.json")):
        return True
    return (folder / LOCK).is_file() and (folder / "run_status.json").is_file()  # of a Heron without records


def check(folder: Path, kept: Iterable[Path] = (), start: Path | None = None) -> None:
    """CheckpointError where a run would write over what is not its own.

    Args:
        kept: files that the run reads and leaves as they are.
        start: weights in the folder that a run there would start from.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"out: {folder} is a file; name a folder")
    kept = {path.resolve() for path in kept}
    begun = has_begun(folder)
    names = [FINAL] if begun else _WRITTEN
    foreign = [name for name in names if os.path.lexists(folder / name) and (folder / name).resolve() not in kept]
    if begun and is_own(folder / FINAL):
        foreign = []
    if foreign:
        start = start or (folder / FINAL if FINAL in foreign else None)
        example = "" if start is None else f", such as --model {start} --out {folder}-2"
        raise CheckpointError(
            f"{folder}: {', '.join(foreign)} {'is' if len(foreign) == 1 else 'are'} there, no run of heron wrote that, "
            f"and this one would write over it; name another --out{example}, or move it"
        )


def claim(folder: Path) -> None:
    """Write down that a run has begun here. The caller holds the lock, and has called :func:`check`."""
    if _record(folder):
        return
    older = [folder / name for name in (INIT, FINAL) if has_begun(folder) and (folder / name).is_file()]
    _append(folder, [_BEGUN, *(f"{path.name} {_fingerprint(path)}" for path in older)])


def is_own(path: Path) -> bool:
    """Whether the run in whose folder a weights file lies has written it."""
    if not path.is_file():
        return False
    record = _record(path.parent)
    if not record:
        return has_begun(path.parent)
    lines = [line for line in record if line.startswith(f"{path.name} ")]
    return bool(lines) and (lines[-1] == f"{path.name} {_PENDING}" or f"{path.name} {_fingerprint(path)}" in lines)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Write or replace a weights file of the run inside.

    Raises:
        CheckpointError: there is such a file that the run did not write.
    """
    if os.path.lexists(path) and not is_own(path):
        raise CheckpointError(f"{path}: this run did not write it; move it, and run the same command again")
    _append(path.parent, [f"{path.name} {_PENDING}"])
    yield
    _append(path.parent, [f"{path.name} {_fingerprint(path)}"])


def _record(folder: Path) -> list[str]:
    try:
        return (folder / LOCK).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _append(folder: Path, lines: list[str]) -> None:
    with open(folder / LOCK, "a", encoding="utf-8", newline="\n") as file:
        file.write("".join(f"{line}\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(_END_BYTES))
        file.seek(max(size - _END_BYTES, 0))
        digest.update(file.read())
    return f"{size} {digest.hexdigest()}"
