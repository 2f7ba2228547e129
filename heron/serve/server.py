"""uvicorn as `heron serve` runs it: it tells where it listens, ends in order, and logs failures alone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import uvicorn

from heron.config.serve import ServeConfig
from heron.errors import ConfigError
from heron.serve.protocol import guarded_protocol

SECONDS_TO_TELL = 5  # after the grace: clients whose requests were cut off get an error
# uvloop takes one connection for each listener in a turn of its loop, which lasts milliseconds where many streams are
# open. Windows, which has no uvloop, does not let a socket listen twice.
LISTENERS = 1 if sys.platform == "win32" else 16


class Server(uvicorn.Server):
    """Whoever runs it passes the signals that shall end it to `handle_exit`.

    Args:
        stop: has the application finish what runs, within so many seconds, and end the rest.
        grace: those seconds.
        listening: is called with the address once it accepts.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        stop: Callable[[float], Coroutine[Any, Any, None]],
        grace: float,
        listening: Callable[[str], object],
    ):
        super().__init__(config)
        self._stop, self._grace, self._listening = stop, grace, listening

    async def startup(self, sockets: Any = None) -> None:
        host, port = self.config.host, self.config.port
        try:
            bound = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)
            sockets = [one.dup() for one in bound.sockets for _ in range(LISTENERS)]
            bound.close()
            await super().startup(sockets)
        except OSError as error:
            raise ConfigError(f"host {host}, port {port}: cannot listen there: {error}") from None
        self._listening(self.address)

    async def shutdown(self, sockets: Any = None) -> None:
        """Take no more connections. What runs has its time to end, and is told where that is not enough."""
        stops = asyncio.create_task(self._stop(self._grace))
        await super().shutdown(sockets)
        if self.force_exit:  # a second Ctrl-C
            await self._stop(0)
            await self.lifespan.shutdown()
        await stops

    @property
    def address(self) -> str:
        """As a browser takes it."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def log_failures() -> None:
    """Have failures alone printed, as lines of ours."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("heron: %(message)s"))
    for name in ("uvicorn.error", "heron.serve"):
        logging.getLogger(name).handlers = [handler]
        logging.getLogger(name).setLevel(logging.ERROR)


def server_of(app: Any, config: ServeConfig, listening: Callable[[str], object] = lambda address: None) -> Server:
    """A server of the application, whose `run` returns once it has ended; `listening` gets its address."""
    log_failures()
    return Server(
        uvicorn.Config(
            app, config.host, config.port,
            http=guarded_protocol(), ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_keep_alive=75,
            timeout_graceful_shutdown=math.ceil(config.grace) + SECONDS_TO_TELL,
        ),
        app.state.stop,
        config.grace,
        listening,
    )  # fmt: skip
