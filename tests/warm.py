"""Processes of Python in which PyTorch, Heron and what tests import are imported already, which takes many seconds.

One process, the server, imports all and forks; the workers of the suite are forked by it, and what `start` starts. It
is `python -m tests.warm FILENO`, and ends with the process that has started it. What comes of a fork runs `-m MODULE`
or `-c CODE` as Python would, and ends as Python ends. It does not await the disk, and draws no picture of a run.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).parents[1]
ADDRESS = "HERON_TESTS_WARM"  # the environment variable with the address of a server's socket
_NUMBER = 4  # bytes of a process number or an exit code
_FILES = 4  # that come with a request
_LIBRARIES = (  # where installed
    "httpx", "hypothesis", "matplotlib.backends.backend_agg", "matplotlib.figure", "music21", "networkx", "openai",
    "peft", "schemathesis", "torch._inductor.compile_fx", "transformers",
)  # fmt: skip
_address = os.environ.get(ADDRESS)
_servers: list[subprocess.Popen] = []  # that end with this process


class Process:
    """As subprocess.Popen of `python ARGUMENTS`, with text; see :func:`start`."""

    def __init__(self, arguments: Sequence[object], stdout, stderr, env=None, cwd=None, stdin=subprocess.DEVNULL):
        self.args, self.returncode = [*map(str, arguments)], None
        self._told, tells = os.pipe()
        read = os.open(os.devnull, os.O_RDONLY) if stdin == subprocess.DEVNULL else os.dup(stdin.fileno())
        self.stdout, out = _reads_and_written(stdout)
        self.stderr, errors = (None, os.dup(out)) if stderr == subprocess.STDOUT else _reads_and_written(stderr)
        asked = dict(arguments=self.args, env=dict(env or os.environ), cwd=str(cwd or os.getcwd()))
        files = [tells, read, out, errors]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
            server.connect(_address or _own_server())
            socket.send_fds(server, [json.dumps(asked).encode()], files)
        for file in files:
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


def worker() -> str:
    """The command line of a Python for xdist: `-u -c CODE` behind it is run by a process that a server has forked."""
    return shlex.join([sys.executable, "-E", __file__])


@functools.cache
def _own_server() -> str:
    return start_server()


def start_server() -> str:
    """Start a server that ends with this process, and return the address of its socket."""
    address = os.path.join(tempfile.mkdtemp(prefix="heron-warm-"), "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(100)  # who asks before all is imported waits
        number = listener.fileno()
        command = [sys.executable, "-m", "tests.warm", str(number)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=[number], cwd=REPOSITORY, start_new_session=True
        )
    _servers.append(process)  # its stdin is closed when this process ends
    atexit.register(shutil.rmtree, os.path.dirname(address), ignore_errors=True)
    return address


def forks(listener: socket.socket) -> dict:
    """Fork what is asked for, until stdin is closed. In a process that was forked: what it has to run."""
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            sys.exit()
        asked, _ = listener.accept()
        with asked:
            request, files, *_ = socket.recv_fds(asked, 1 << 20, _FILES)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            listener.close()
            _begin(*files)
            return json.loads(request)
        for file in files:
            os.close(file)


def _begin(tells: int, read: int, out: int, errors: int) -> None:
    """Fork once more, and tell of the process that comes back from here: its number, then how it has ended."""
    if child := os.fork():
        for file in (read, out, errors):
            os.close(file)
        os.write(tells, child.to_bytes(_NUMBER, sys.byteorder, signed=True))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(tells, code.to_bytes(_NUMBER, sys.byteorder, signed=True))
        os._exit(0)
    os.setsid()
    for number, file in enumerate((read, out, errors)):
        os.dup2(file, number)
    for file in (tells, read, out, errors):
        os.close(file)


def become(arguments: list[str], env: dict[str, str], cwd: str) -> None:
    """Run what follows `python`."""
    how, what, *words = arguments
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv, sys.path[0] = [how, *words], cwd
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})


def _build() -> None:
    """Build, before there are workers, the libraries that all of them would wait for."""
    from heron import progress
    from heron.errors import KernelError
    from heron.ops.rosa import cpu as rosa
    from heron.ops.token_step import cpu as token_step
    from tests.ops import emulator

    progress.PATIENCE_S = 1e6  # says nothing
    with contextlib.suppress(KernelError):  # no compiler: what needs one says so
        for load in (token_step.library, emulator.load, rosa.library):
            load()


def serve(listener: socket.socket) -> None:
    """Import all, then fork what is asked for; returns in a process that was forked, and has done what it had to."""
    for name in (
        "heron.generation", "heron.commands.serve", "heron.commands.train", "heron.serve.processes", "heron.train.loop",
        "tests.torchrun",
    ):  # fmt: skip
        importlib.import_module(name)
    if os.fork() == 0:
        listener.close()
        _build()
        os._exit(0)
    for name in _LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    os.fsync = lambda _: None  # as in tests/conftest.py
    sys.modules["heron.train.loop"].plot = lambda folders, out: None
    gc.freeze()  # to look for cycles in what was imported would copy it
    become(**forks(listener))


if __name__ == "__main__":
    if sys.argv[1] == "-u":
        process = Process(sys.argv[2:], sys.stdout, sys.stderr, stdin=sys.stdin)
        sys.exit(process.wait() % 256)
    serve(socket.socket(fileno=int(sys.argv[1])))
