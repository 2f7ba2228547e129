"""``python -m tests.forked ARGUMENTS``: `python -m benchmarks.many_gpus ARGUMENTS` with programs that are forked.

Where the command starts torchrun, torchrun's engine starts them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from functools import partial
from typing import IO

from benchmarks.many_gpus import __main__ as many_gpus
from benchmarks.many_gpus import launch, witness
from heron import cli
from heron.train import loop
from tests.torchrun import code_of, torchrun

MAINS = {"heron": cli.main, "benchmarks.many_gpus.witness": witness.main}


class Forked:
    """A process, as `launch.begin` returns it."""

    def __init__(self, pid: int):
        self.pid, self._code = pid, None

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (1e6 if timeout is None else timeout)
        while self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise subprocess.TimeoutExpired("forked", timeout or 0)
            else:
                time.sleep(0.01)
        return self._code


def begin(program: list[str], processes: int, restarts: int, environment: dict[str, str], output: IO[str]) -> Forked:
    """In the place of `launch.begin`."""
    assert program[0] == "-m"
    if pid := os.fork():
        return Forked(pid)
    code = 1
    with contextlib.suppress(BaseException):
        os.setsid()
        for number in (1, 2):
            os.dup2(output.fileno(), number)
        os.environ.update(environment)
        work = partial(MAINS[program[1]], program[2:])
        code = torchrun(work, processes, restarts) if processes > 1 or restarts else code_of(work)
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    loop.plot = lambda folders, out: None  # seconds, and tested elsewhere
    launch.begin = begin
    sys.exit(many_gpus.main())
