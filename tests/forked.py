"""``python -m tests.forked ARGUMENTS``: `python -m benchmarks.many_gpus ARGUMENTS` with programs that are forked.

That imports all once, since an import takes seconds. Where the command starts torchrun, torchrun's engine starts them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import traceback
import uuid
from typing import IO

from torch import distributed
from torch.distributed import fsdp as fsdp
from torch.distributed import tensor as tensor
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.many_gpus import __main__ as many_gpus
from benchmarks.many_gpus import launch, witness
from heron import cli
from heron.train import loop

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
        code = _torchrun(program, processes, restarts) if processes > 1 or restarts else _run(program)
    sys.stdout.flush()
    os._exit(code)


def _run(program: list[str]) -> int:
    try:
        return MAINS[program[1]](program[2:])
    except Exception:
        traceback.print_exc()
        return 1


def _torchrun(program: list[str], processes: int, restarts: int) -> int:
    config = LaunchConfig(
        1, 1, processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
        max_restarts=restarts, monitor_interval=0.05, start_method="fork", local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(),
    )  # fmt: skip
    try:
        elastic_launch(config, lambda: sys.exit(_run(program)))()
    except ChildFailedError:
        return 1
    return 0


if __name__ == "__main__":
    assert distributed.is_available()
    loop.plot = lambda folders, out: None  # seconds, and tested elsewhere
    launch.begin = begin
    sys.exit(many_gpus.main())
