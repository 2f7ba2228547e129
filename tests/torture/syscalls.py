"""kill -9 at every system call of one save: the newest whole checkpoint is always there, never torn, never mixed.

The child asks to be traced (ptrace) and stops at the entry of each system call of its saving thread; at the n-th it is
killed, so that what the n - 1 before it did is on the disk and nothing else. The save holds a write of every file, the
rename, and the deletion of the oldest checkpoint. The control rewrites the one checkpoint there is in place.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

import torch

import heron
from heron import files
from heron.checkpoint import run as checkpoints
from heron.errors import CheckpointError
from tests.torture import minute
from tests.torture.result import Result

MODEL = minute.MODEL.changed(n_embd=64)  # its tables are hashed in another thread
TRACE_ME, SYSCALL, SET_OPTIONS = 0, 24, 0x4200
MARK_SYSCALLS, KILL_WITH_PARENT = 1, 1 << 20
IN_SYSCALL = signal.SIGTRAP | 0x80


def run(trials: int, seed: int) -> Result:
    """Kill at up to `trials` of the system calls, evenly spread; all of them if there are no more."""
    failures = []
    with tempfile.TemporaryDirectory(prefix="heron-syscalls-") as name:
        folder = Path(name)
        before, after = _trained(seed), _trained(seed + 1)
        for step in (1, 2):
            _save(before, folder / "base", step, keep=2)
        shutil.copytree(folder / "base", folder / "counted")
        total = _until(None, lambda: _save(after, folder / "counted", 3, keep=2))
        points = [1 + i * total // min(trials, total) for i in range(min(trials, total))]
        for point in points:
            run_folder = folder / "run"
            shutil.copytree(folder / "base", run_folder)
            _until(point, lambda: _save(after, folder / "run", 3, keep=2))
            problem = _problem(run_folder, after)
            if problem:
                failures.append(f"call {point} of {total}: {problem}")
            shutil.rmtree(run_folder)

        _save(before, folder / "single", 2, keep=1)
        shutil.copytree(folder / "single", folder / "counted-in-place")
        with in_place():
            in_place_total = _until(None, lambda: _save(after, folder / "counted-in-place", 3, keep=1))
            controls = max(2, len(points) // 20)
            caught = 0
            for _ in range(controls):
                run_folder = folder / "control"
                shutil.copytree(folder / "single", run_folder)
                point = random.Random(seed).randrange(in_place_total // 3, in_place_total * 2 // 3)
                _until(point, lambda: _save(after, folder / "control", 3, keep=1))
                caught += _problem(run_folder, after) is not None
                shutil.rmtree(run_folder)
    return Result(
        "kill -9 at every system call of one save: nothing torn, nothing mixed, the newest whole step",
        len(points),
        total,
        failures,
        "the checkpoint rewritten in place: no restart",
        caught,
        controls,
        f"{total} system calls",
    )


def _trained(seed: int) -> minute.Trained:
    torch.manual_seed(seed)
    model = heron.RWKV(MODEL)
    whole = minute.Trained(model, heron.build_optimizer(model))
    whole.step()
    return whole


def _save(trained: minute.Trained, folder: Path, step: int, keep: int) -> None:
    moments = sum(float(state["exp_avg"].double().sum()) for state in trained.optimizer.state.values())
    record = {"step": step, "weights": minute.fingerprint(trained.model), "moments": moments}
    checkpoints.save(folder, step, trained.model, trained.optimizer, record, "seed: 0\n", keep)


def _problem(folder: Path, after: minute.Trained) -> str | None:
    """What is wrong with what a kill left, if anything: the restart, the step, the parts, the next save."""
    renamed = (folder / "checkpoints" / "step-00000003").is_dir()
    try:
        newest = checkpoints.newest(folder)
        torch.manual_seed(99)
        model = heron.RWKV(MODEL)
        optimizer = heron.build_optimizer(model)
        record = checkpoints.restore(newest, model, optimizer)
    except CheckpointError as error:
        return f"no restart: {error}"
    if record["step"] != (3 if renamed else 2):
        return f"step {record['step']} was taken up, the newest whole one is {3 if renamed else 2}"
    moments = sum(float(state["exp_avg"].double().sum()) for state in optimizer.state.values())
    if (minute.fingerprint(model), moments) != (record["weights"], record["moments"]):
        return "the parts are of different steps"
    _save(after, folder, 4, keep=2)
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    kept = ["step-00000003" if renamed else "step-00000002", "step-00000004"]
    return None if left == kept else f"{left} are left after the next save, wanted {kept}"


@contextlib.contextmanager
def in_place():
    """While inside, a save first removes what is there and then writes under its final name, as many trainers do."""

    @contextlib.contextmanager
    def same_folder(path):
        for older in path.parent.glob("step-*"):
            shutil.rmtree(older)
        path.mkdir(parents=True)
        yield path

    with minute.replaced(files, "new_folder", same_folder):
        yield


def _until(point: int | None, work) -> int:
    """Do `work` in a child that is killed at the entry of its n-th system call (None: never); calls that it made."""

    def traced() -> int:
        _ptrace(TRACE_ME, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()
        return 0

    pid = minute.child(traced)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        raise RuntimeError("ptrace: this system does not let a process be traced")
    _ptrace(SET_OPTIONS, pid, MARK_SYSCALLS | KILL_WITH_PARENT)
    entries, inside, deliver = 0, False, 0
    while True:
        _ptrace(SYSCALL, pid, deliver)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if point is None and status != 0:
                raise RuntimeError(f"the save itself ended with {os.waitstatus_to_exitcode(status)}")
            return entries
        deliver = 0
        if os.WSTOPSIG(status) != IN_SYSCALL:
            deliver = os.WSTOPSIG(status)
            continue
        inside = not inside
        entries += inside
        if inside and entries == point:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return entries


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(request: int, pid: int, data: int) -> None:
    if _libc.ptrace(request, pid, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace request {request}: {os.strerror(number)}")
