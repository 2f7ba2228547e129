"""Python programs on so many GPUs, until a time limit: what they printed, or in one line why they failed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

from benchmarks.jobs import visible_devices
from heron.errors import HeronError

REPOSITORY = Path(__file__).parents[2]
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?(heron(?: \w+)?: .*|(?:\w+\.)*\w*(?:Error|Exception)\b.*)$")
_NO_CAUSE = re.compile(r"another process of the run|ends as rank|ChildFailedError|: warning: |\.\.\.$|: done after ")


class Process(Protocol):
    """Of a `subprocess.Popen`, what is used here."""

    pid: int

    def wait(self, timeout: float | None = None) -> int: ...


class Launcher:
    """Starts programs. What has not ended by `end`, a reading of `time.monotonic`, is ended."""

    def __init__(self, end: float):
        self._end = end
        self._devices = visible_devices()

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return max(0.0, self._end - time.monotonic())

    def run(self, program: Sequence[str], gpus: int = 1, restarts: int = 0) -> str:
        """What a program prints that runs on so many GPUs, or as so many processes on CPUs.

        Args:
            program: what follows `python`.
            restarts: how often torchrun starts all processes anew after one has died.

        Raises:
            HeronError: it failed, or the time was over.
        """
        with self._started(program, gpus, 0, restarts) as wait:
            return wait()

    def side_by_side(self, programs: Sequence[tuple[Sequence[str], int]]) -> None:
        """The same of several programs at a time, each on as many GPUs of its own as it comes with."""
        first = 0
        with contextlib.ExitStack() as stack:
            waits = []
            for program, gpus in programs:
                waits.append(stack.enter_context(self._started(program, gpus, first, 0)))
                first += gpus
            for wait in waits:
                wait()

    @contextlib.contextmanager
    def _started(self, program: Sequence[str], gpus: int, first: int, restarts: int) -> Iterator[Callable[[], str]]:
        """Start a program on GPU number `first` and those behind it; what waits for its end, which is here at last."""
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path}
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._devices[first : first + gpus])
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            process = begin(list(program), gpus, restarts, environment, output)
            try:
                yield lambda: self._said(process, output)
            finally:
                _kill(process)

    def _said(self, process: Process, output: IO[str]) -> str:
        try:
            code = process.wait(self.left)
        except subprocess.TimeoutExpired:
            raise HeronError("ended, as the time was over") from None
        output.seek(0)
        said = output.read()
        if code:
            raise HeronError(cause(said, code))
        return said


def begin(program: list[str], processes: int, restarts: int, environment: dict[str, str], output: IO[str]) -> Process:
    """Start Python, or torchrun where there are to be several processes of it or one may be started anew."""
    launcher = []
    if processes > 1 or restarts:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        launcher = [*torchrun, "--max-restarts", str(restarts)]
    return subprocess.Popen(
        [sys.executable, *launcher, *program], env=environment, cwd=REPOSITORY, stdout=output,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def cause(said: str, code: int) -> str:
    """The line of what a program and its launcher printed that says best why it failed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [found[1] for line in lines if (found := _ERROR.match(line))]
    causes = [line for line in errors if not _NO_CAUSE.search(line)]
    named = [*causes[:1], *errors[-1:], *lines[-1:]]
    return named[0] if named else f"ended with {code} and said nothing"


def _kill(process: Process) -> None:
    """End a program with all that it has started: torchrun's processes are in sessions of their own."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0)
        return
    for pid in (process.pid, *_below(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _below(pid: int) -> list[int]:
    """The processes that one has started, and what these have."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):
            for child in map(int, children.read_text().split()):
                found += [child, *_below(child)]
    return found
