"""A server in a thread of the tests, and what is asked of it over a socket."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from heron.serve import ServeConfig, create_app
from heron.serve.server import server_of
from tests import warm


@contextlib.contextmanager
def running(engine, engines=None, states=None, template=None, **settings) -> Generator[str]:
    """The address of a server of an engine; `settings` are those of a ServeConfig."""
    config = ServeConfig(**{"port": 0, "name": "tiny", "grace": 1.0, **settings})
    server = server_of(create_app(engine, config, engines or {}, states or {}, template), config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield server.address
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def running_alone(model: Path, *flags: str) -> Generator[tuple[str, int]]:
    """The address and the process number of a `heron serve` in a process of its own."""
    arguments = ["-m", "heron", "serve", model, "--port", "0", *flags]
    with warm.start(arguments, stderr=subprocess.DEVNULL) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            assert line.startswith("listening on "), line
            yield line.removeprefix("listening on ").strip(), process.pid
        finally:
            process.terminate()


def until(is_so: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something; fail where it does not come."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def raw(address: str, data: bytes = b"", receives: int | None = None) -> socket.socket:
    """A connection on which `data` has been sent, with a buffer of `receives` bytes for what comes."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.settimeout(20)
    if receives is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)  # before the connection agrees on it
    connection.connect((host, int(port)))
    connection.sendall(data)
    return connection


def request_of(body: Any, path: str = "/v1/completions", **headers: Any) -> bytes:
    """A POST of bytes, or of a value as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": len(data), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data


def status_of(connection: socket.socket) -> int | None:
    """The status that comes, or None where the connection is closed without one."""
    with connection:
        line = connection.makefile("rb").readline()
    return int(line.split()[1]) if line else None


def children(process: int) -> list[int]:
    """The processes that a process has started, by their numbers."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def resident_mib(process: int | str = "self") -> float:
    """Memory of a process, by its number; without one, of this process."""
    with open(f"/proc/{process}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4 / 1024
