"""How HTTP reaches the engines. Here: in the same process; :mod:`heron.serve.processes` has the way to another one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from heron.serve.engines import Engines
from heron.serve.orders import Drawn

_P = ParamSpec("_P")
_T = TypeVar("_T")
Take = Callable[[str, Sequence[Drawn]], None]  # gets the name of an engine and what it has drawn, in the event loop


class Link(Protocol):
    """What HTTP asks of the engines goes through here. A method is one of :class:`heron.serve.engines.Engines`."""

    def start(self, take: Take) -> None:
        """Begin, in the event loop of HTTP."""
        ...

    def tell(self, method: Callable[Concatenate[Engines, _P], None], *args: _P.args, **options: _P.kwargs) -> None:
        """Have a short method called; what is told first is done first."""
        ...

    async def ask(self, method: Callable[Concatenate[Engines, _P], _T], *args: _P.args, **options: _P.kwargs) -> _T:
        """What a method gives, that may take a while. Raises what it raises."""
        ...


class Direct:
    """The engines of this process, whose threads share Python's lock with HTTP."""

    def __init__(self, engines: Engines):
        self._engines = engines

    def start(self, take: Take) -> None:
        loop = asyncio.get_running_loop()

        def deliver(engine: str, drawn: list[Drawn]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(take, engine, drawn)

        self._engines.start(deliver)

    def tell(self, method: Callable[Concatenate[Engines, _P], None], *args: _P.args, **options: _P.kwargs) -> None:
        method(self._engines, *args, **options)

    async def ask(self, method: Callable[Concatenate[Engines, _P], _T], *args: _P.args, **options: _P.kwargs) -> _T:
        return await asyncio.to_thread(functools.partial(method, self._engines, *args, **options))
