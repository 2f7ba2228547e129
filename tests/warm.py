"""Processes of Python in which PyTorch and Heron are imported already, which otherwise takes each of them two seconds.

`start` asks `python -m tests.warm FILENO`, of which every worker of the suite has one: it imports all once and forks.
What comes of it runs `-m MODULE` or `-c CODE` as Python would, and ends as Python ends. It does not await the disk.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).parents[1]
_NUMBER = 4  # bytes of a process number or an exit code


class Process:
    """As subprocess.Popen of `python ARGUMENTS`, with text; see :func:`start`."""

    def __init__(self, arguments: Sequence[object], stdout, stderr, env: Mapping[str, str] | None, cwd: object):
        self.args, self.returncode = [*map(str, arguments)], None
        self._told, tells = os.pipe()
        self.stdout, out = _reads_and_written(stdout)
        self.stderr, errors = (None, os.dup(out)) if stderr == subprocess.STDOUT else _reads_and_written(stderr)
        asked = dict(arguments=self.args, env=dict(env or os.environ), cwd=str(cwd or os.getcwd()))
        socket.send_fds(_warm(), [json.dumps(asked).encode()], [tells, out, errors])
        for file in (tells, out, errors):
            os.close(file)
        self.pid = self._number()

    def _number(self) -> int:
        told = os.read(self._told, _NUMBER)
        assert told, "the process that forks others has ended"
        return int.from_bytes(told, sys.byteorder, signed=True)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._number()
            os.close(self._told)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, errors = ("" if file is None else file.read() for file in (self.stdout, self.stderr))
        return out, errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        for file in (self.stdout, self.stderr):
            if file is not None:
                file.close()


def _reads_and_written(wanted: int | IO[str]) -> tuple[IO[str] | None, int]:
    """What is read here, where that is wanted, and the file that a process writes."""
    if wanted == subprocess.PIPE:
        reads, writes = os.pipe()
        return os.fdopen(reads, errors="replace"), writes
    return None, os.open(os.devnull, os.O_WRONLY) if wanted == subprocess.DEVNULL else os.dup(wanted.fileno())


def start(
    arguments: Sequence[object], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=None, cwd=None
) -> Process | subprocess.Popen[str]:
    """Start `python ARGUMENTS` in a session of its own. Nobody reads its pipes before it ends: what it prints must fit.

    Args:
        arguments: "-m" or "-c", and what follows.
        env: the whole environment, for the program; Python itself reads none of it, such as PYTHONPATH.
    """
    if sys.platform == "linux":  # elsewhere a fork is not there, or not safe
        return Process(arguments, stdout, stderr, env, cwd)
    command = [sys.executable, *map(str, arguments)]
    options = dict(env=env, cwd=cwd, text=True, start_new_session=True)
    return subprocess.Popen(command, stdout=stdout, stderr=stderr, **options)


def run(arguments: Sequence[object], timeout: float = 300, env: Mapping[str, str] | None = None) -> None:
    """Run `python ARGUMENTS` in the repository; AssertionError with what it has printed where it fails."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        with start(arguments, output, subprocess.STDOUT, env, REPOSITORY) as process:
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
        output.seek(0)
        assert code == 0, output.read()


@functools.cache
def _warm() -> socket.socket:
    """What `forks` reads, of a process that ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        number = theirs.fileno()
        command = [sys.executable, "-m", "tests.warm", str(number)]
        subprocess.Popen(command, pass_fds=[number], cwd=REPOSITORY, start_new_session=True)
    return ours


def forks(asked: socket.socket) -> dict:
    """Fork what is asked for. In a process that was forked: what it has to run."""
    while True:
        request, files, *_ = socket.recv_fds(asked, 1 << 20, 3)
        if not request:
            sys.exit()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            asked.close()
            _begin(*files)
            return json.loads(request)
        for file in files:
            os.close(file)


def _begin(tells: int, out: int, errors: int) -> None:
    """Fork once more, and tell of the process that comes back from here: its number, then how it has ended."""
    if child := os.fork():
        for file in (out, errors):
            os.close(file)
        os.write(tells, child.to_bytes(_NUMBER, sys.byteorder, signed=True))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(tells, code.to_bytes(_NUMBER, sys.byteorder, signed=True))
        os._exit(0)
    os.setsid()
    for file, number in ((out, 1), (errors, 2)):
        os.dup2(file, number)
    for file in (tells, out, errors):
        os.close(file)


def become(arguments: list[str], env: dict[str, str], cwd: str) -> None:
    """Run what follows `python`."""
    how, what, *words = arguments
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv, sys.path[0] = [how, *words], cwd
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})


if __name__ == "__main__":
    from heron import generation as generation
    from heron.commands import serve as serve
    from heron.commands import train as train
    from heron.serve import processes as processes
    from heron.train import loop as loop
    from tests import torchrun as torchrun

    os.fsync = lambda _: None  # as in tests/conftest.py
    gc.freeze()  # to look for cycles in what was imported would copy it
    become(**forks(socket.socket(fileno=int(sys.argv[1]))))
