"""A disk that is full after so many bytes, or read-only: one clear message, and no older checkpoint is harmed.

Three ways in turn: no file may grow beyond n bytes (RLIMIT_FSIZE, to the byte), a real file system with n bytes left
(tmpfs in a mount namespace of the child), and one that turned read-only. Where a process may not mount, the first way
takes the place of the others, and the notes say so. The control rewrites a checkpoint in place.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import resource
import shutil
import signal
import tempfile
from pathlib import Path

from heron.checkpoint import run as checkpoints
from heron.errors import CheckpointError
from tests.torture import minute
from tests.torture.result import Result
from tests.torture.syscalls import in_place

DISK = 1 << 20
NEW_NAMESPACE, PRIVATE, REMOUNT_READ_ONLY = 0x00020000, 0x4000 | 0x40000, 32 | 1
OUR_MESSAGE = re.compile(r"step-\d{8}(-\w+)?: cannot be written: .*A checkpoint needs [\d,]+ bytes, .* are free")


def run(trials: int, seed: int) -> Result:
    """Let `trials` saves fail."""
    draw, failures = random.Random(seed), []
    with tempfile.TemporaryDirectory(prefix="heron-disk-") as name:
        folder = Path(name)
        trained = minute.trained(seed)
        trained.save(folder / "base", 1)
        newest = trained.save(folder / "base", 2)
        largest = max(path.stat().st_size for path in newest.iterdir())
        needed = sum(path.stat().st_size for path in newest.iterdir())
        mounts = _in_child(lambda: "" if _mount(folder / "disk") else "no") == ""
        for trial in range(trials):
            way = ("limit", "tmpfs", "limit", "tmpfs", "read-only")[trial % 5] if mounts else "limit"
            n = draw.randrange(largest if way == "limit" else needed)
            problem = _in_child(lambda way=way, n=n: _trial(folder, trained, way, n))
            if problem:
                failures.append(f"{way}, {n} bytes: {problem}")
        controls = max(2, trials // 20)
        with in_place():
            broken = [_in_child(lambda: _trial(folder, trained, "limit", largest // 2)) for _ in range(controls)]
    return Result(
        "a full disk: a clear message, older checkpoints unharmed",
        trials,
        100,
        failures,
        "the checkpoint rewritten in place: it is lost",
        sum(map(bool, broken)),
        controls,
        "limits on file size, tmpfs and read-only" if mounts else "limits on file size alone: no right to mount",
    )


def _trial(folder: Path, trained: minute.Trained, way: str, n: int) -> str:
    """What went wrong in one save that must fail; an empty text if nothing did."""
    disk = folder / "disk"
    if way == "limit":
        shutil.rmtree(disk, ignore_errors=True)
    else:
        _mount(disk)
    shutil.copytree(folder / "base", disk, dirs_exist_ok=True)
    if way == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
    elif way == "tmpfs":
        _fill(disk / "filler", n)
    elif _libc.mount(None, str(disk).encode(), None, REMOUNT_READ_ONLY, None):
        return f"remount: {os.strerror(ctypes.get_errno())}"
    try:
        trained.save(disk, 3)
    except CheckpointError as error:
        if not OUR_MESSAGE.search(str(error)):
            return f"unclear message: {error}"
    else:
        return "the save succeeded"
    if sorted(path.name for path in (disk / "checkpoints").iterdir()) != ["step-00000001", "step-00000002"]:
        return f"left: {sorted(path.name for path in (disk / 'checkpoints').iterdir())}"
    for step in (1, 2):
        checkpoints.verify(disk / "checkpoints" / f"step-{step:08d}")
    if way == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    elif way == "tmpfs":
        (disk / "filler").unlink()
    if way != "read-only":
        checkpoints.verify(trained.save(disk, 4))
    return ""


def _fill(filler: Path, left: int) -> None:
    """Leave `left` bytes of a disk free, up to a page."""
    with filler.open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(filler.parent).free - left)))


def _mount(folder: Path) -> bool:
    """A fresh file system of `DISK` bytes at a folder, seen by this process alone; whether that is allowed."""
    folder.mkdir(exist_ok=True)
    return (
        _libc.unshare(NEW_NAMESPACE) == 0
        and _libc.mount(b"none", b"/", None, PRIVATE, None) == 0
        and _libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={DISK}".encode()) == 0
    )


def _in_child(work) -> str:
    """The text that `work` gives in a child; its error if it raises."""
    reading, writing = os.pipe()

    def tell() -> int:
        try:
            text = work()
        except CheckpointError as error:
            text = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.write(writing, text.encode())
        return 0

    pid = minute.child(tell)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    code = minute.wait(pid)
    return text if code == 0 else f"the child ended with {code}"


_libc = ctypes.CDLL(None, use_errno=True)
