"""Processes side by side: as many as asked for, over all GPUs, and none begun that would not end in time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

_POLL_S = 0.2


class Job(NamedTuple):
    """A process in a folder of its own, which goes away with it.

    Attributes:
        command: what to start, given that folder.
        is_done: whether all that is wanted of it is there; what it would do after that is not waited for.
        keep: takes from the folder what is to be kept, and the seconds that it took.
    """

    name: str
    command: Callable[[Path], Sequence[str]]
    is_done: Callable[[Path], bool]
    keep: Callable[[Path, float], None]


class _Running(NamedTuple):
    job: Job
    slot: int
    folder: Path
    process: subprocess.Popen
    begun: float


def run(
    jobs: Sequence[Job],
    side_by_side: int,
    seconds: float,
    expected: Callable[[Job], float],
    say: Callable[[str], None],
) -> list[str]:
    """Run jobs in their order, and say how each ended.

    Args:
        side_by_side: processes at a time; on a machine of several GPUs they go round these.
        seconds: no job begins that would not end by then, and what has not ended then is ended.
        expected: how long a job will take, asked when it would begin.

    Returns:
        The names of those that failed. Those that had no time are not among them.
    """
    begun, waiting, running, failed = time.monotonic(), list(jobs), [], []
    slots, done, devices = list(range(side_by_side)), 0, visible_devices()
    try:
        while waiting or running:
            left = begun + seconds - time.monotonic()
            while waiting and slots and expected(waiting[0]) <= left:
                running.append(_start(waiting.pop(0), slots.pop(0), devices))
            if waiting and not running:
                say(f"{len(waiting)} runs had no time; the same command goes on with them")
                break
            time.sleep(_POLL_S)
            for one in list(running):
                took = time.monotonic() - one.begun
                is_done = one.job.is_done(one.folder)
                if not is_done and one.process.poll() is None and left > 0:
                    continue
                running.remove(one)
                slots.append(one.slot)
                _end(one.process)
                done += 1
                if is_done:
                    one.job.keep(one.folder, took)
                    say(f"{one.job.name}: {took:.0f} s, {done} of {len(jobs)}")
                elif left <= 0:
                    say(f"{one.job.name}: ended after {took:.0f} s, as the time is over")
                else:
                    failed.append(one.job.name)
                    say(f"{one.job.name}: failed: {_last_words(one.folder)}")
                shutil.rmtree(one.folder)
    finally:
        for one in running:
            _end(one.process)
            shutil.rmtree(one.folder, ignore_errors=True)
    return failed


def visible_devices() -> list[str]:
    """The GPUs, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def _start(job: Job, slot: int, devices: Sequence[str]) -> _Running:
    folder = Path(tempfile.mkdtemp(prefix="heron-job-"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            job.command(folder), env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    return _Running(job, slot, folder, process, time.monotonic())


def _end(process: subprocess.Popen) -> None:
    """End a process with all that it has started; its folder goes away, so there is nothing for it to save."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(folder: Path) -> str:
    lines = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
