"""HTTP in a process of its own. The engines stay in the one that was started, and have its Python to themselves.

The two hold the ends of a pipe that nobody else can open, and speak by pickles. Either one ends when the other does.
Signals are for the process that was started: it passes them on, and the other one ignores its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from heron import tokenizer
from heron.config.serve import ServeConfig
from heron.errors import HeronError
from heron.serve.app import application
from heron.serve.engines import Engines, Offer
from heron.serve.link import Take
from heron.serve.orders import Drawn
from heron.serve.refusals import Refusal
from heron.serve.server import Server, log_failures, server_of

ASKED_AT_ONCE = 8  # of the engines, beside what is told
_SECONDS_BETWEEN_LOOKS = 0.5  # of a wait: on Windows no signal interrupts one without an end
_SWITCH_S = 5e-4  # a thread that reads the pipe waits at most so long for Python's lock, rather than 5 ms
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_log = logging.getLogger("heron.serve")
_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Begin(NamedTuple):
    """To HTTP: listen."""


class _Listening(NamedTuple):
    """To the engines: HTTP accepts."""

    address: str


class _Signal(NamedTuple):
    """To HTTP: what the process that was started got."""

    number: int


class _Pieces(NamedTuple):
    """To HTTP: what an engine has drawn at one step."""

    engine: str
    columns: tuple[Sequence[Any], ...]  # the fields of Drawn, each of all pieces: rows would take longer to pickle


class _Call(NamedTuple):
    """To the engines: a method, and the number of the answer that is wanted."""

    number: int | None
    method: Callable[..., Any]
    args: tuple[Any, ...]
    options: Mapping[str, Any]


class _Answer(NamedTuple):
    """To HTTP: what a call has given."""

    number: int
    value: Any
    error: Exception | None = None


class _Pipe:
    """An end of the pipe, for any thread."""

    def __init__(self, connection: Connection):
        self._connection, self._lock = connection, threading.Lock()

    def send(self, message: Any) -> None:
        """Send, unless the other process has ended, which whoever reads finds out."""
        with self._lock, contextlib.suppress(ConnectionError):
            self._connection.send(message)

    def received(self) -> Generator[Any]:
        """What comes, to the end of the other process."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                yield self._connection.recv()

    def close(self) -> None:
        self._connection.close()


# -- the process that was started, with the engines -------------------------------------------------------------------


class HttpProcess:
    """A process that speaks HTTP; as a context manager, so that it is gone behind it.

    It begins to load what it needs at once, and listens when :meth:`run` is called.

    Args:
        config: of the server, with the name of its template.
        offers: of the engines. Their tokenizers are made again there, by `spec` and `eod`.
    """

    def __init__(self, config: ServeConfig, offers: Mapping[str, Offer]):
        context = multiprocessing.get_context("spawn")  # a fork would inherit a device in use
        ours, theirs = context.Pipe()
        portable = {
            name: (offer._replace(tokenizer=None), offer.tokenizer.spec, offer.tokenizer.eod)
            for name, offer in offers.items()
        }
        self._process = context.Process(
            target=_speak_http, args=(theirs, config, portable), name="heron-http", daemon=True
        )
        with _handled(signal.SIG_IGN):  # which it inherits: it is ended by us alone
            self._process.start()
        theirs.close()
        self._pipe = _Pipe(ours)
        self._signals: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # None: HTTP has ended
        self._failure: Exception | None = None

    def __enter__(self) -> HttpProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()

    def run(self, engines: Engines, listening: Callable[[str], object]) -> None:
        """Serve the engines until SIGINT or SIGTERM ends this in order. `listening` gets the address, in a thread.

        Raises:
            ConfigError: it cannot listen where it should.
            HeronError: HTTP has ended otherwise.
        """
        _be_quick()
        log_failures()
        engines.start(self._deliver)
        reader = threading.Thread(target=self._read, args=(engines, listening), name="heron-pipe", daemon=True)
        reader.start()
        with _handled(lambda number, _: self._signals.put(number)):
            self._pipe.send(_Begin())
            while (number := self._next_signal()) is not None:
                self._pipe.send(_Signal(number))
        engines.stop(0)  # as HTTP has asked before, where it has ended in order
        reader.join()
        self._pipe.close()
        self._process.join()
        if self._failure is not None:
            raise self._failure
        if code := self._process.exitcode:
            how = f"was ended by signal {-code}" if code < 0 else f"has failed with exit code {code}"
            raise HeronError(f"the process that speaks HTTP {how}; start the server again")

    def _next_signal(self) -> int | None:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._signals.get(timeout=_SECONDS_BETWEEN_LOOKS)

    def _deliver(self, engine: str, drawn: Sequence[Drawn]) -> None:
        self._pipe.send(_Pieces(engine, tuple(zip(*drawn, strict=True))))

    def _read(self, engines: Engines, listening: Callable[[str], object]) -> None:
        pool = ThreadPoolExecutor(ASKED_AT_ONCE, "heron-asked")
        try:
            for message in self._pipe.received():
                match message:
                    case _Call(None, method, args, options):
                        method(engines, *args, **options)
                    case _Call():
                        pool.submit(self._answer, engines, message)
                    case _Listening(address):
                        listening(address)
                    case Exception():
                        self._failure = message
        finally:
            self._signals.put(None)
            engines.stop(0)  # for which a call may wait
            pool.shutdown()

    def _answer(self, engines: Engines, call: _Call) -> None:
        number, method, args, options = call
        try:
            answer = _Answer(number or 0, method(engines, *args, **options))
        except HeronError as error:
            answer = _Answer(number or 0, None, error)
        except Exception:
            _log.exception("%s has failed", method.__qualname__)
            answer = _Answer(number or 0, None, Refusal(500, "the server has failed; its log says why"))
        self._pipe.send(answer)


def _be_quick() -> None:
    """Have the threads of this process take turns quickly, and its garbage collector look through new objects alone."""
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()  # what is there now stays: to look through it again would take tenths of a second
    gc.set_threshold(10_000, 10, 10)  # many streams are many objects, which end without it


@contextlib.contextmanager
def _handled(handler: Any) -> Generator[None]:
    """SIGINT and SIGTERM have this handler inside. Only the main thread can set one; in any other nothing changes."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in _SIGNALS} if is_main else {}
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


# -- the process that speaks HTTP --------------------------------------------------------------------------------------


class _Link:
    """The engines of the other process, a :class:`heron.serve.link.Link`."""

    def __init__(self, pipe: _Pipe):
        self._pipe, self._asked = pipe, dict[int, asyncio.Future[Any]]()
        self._numbers = itertools.count()

    def start(self, take: Take) -> None:
        self._take, self._loop = take, asyncio.get_running_loop()

    def tell(self, method: Callable[Concatenate[Engines, _P], None], *args: _P.args, **options: _P.kwargs) -> None:
        self._pipe.send(_Call(None, method, args, options))

    async def ask(self, method: Callable[Concatenate[Engines, _P], _T], *args: _P.args, **options: _P.kwargs) -> _T:
        answer, number = self._loop.create_future(), next(self._numbers)
        self._asked[number] = answer
        try:
            self._pipe.send(_Call(number, method, args, options))
            return await answer
        finally:
            del self._asked[number]

    def take(self, message: _Pieces | _Answer) -> None:
        """Have what has come from the engines taken in the event loop; any thread may call."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            if isinstance(message, _Answer):
                self._loop.call_soon_threadsafe(self._answer, message)
            else:
                drawn = list(map(Drawn, *message.columns))
                self._loop.call_soon_threadsafe(self._take, message.engine, drawn)

    def _answer(self, answer: _Answer) -> None:
        waits = self._asked.get(answer.number)
        if waits is None or waits.done():  # who asked was cancelled
            return
        if answer.error is None:
            waits.set_result(answer.value)
        else:
            waits.set_exception(answer.error)


def _speak_http(
    connection: Connection, config: ServeConfig, portable: Mapping[str, tuple[Offer, str, int | None]]
) -> None:
    """What the process does."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    pipe, made = _Pipe(connection), functools.cache(tokenizer.load)
    link = _Link(pipe)

    def read(server: Server) -> None:
        for message in pipe.received():
            if isinstance(message, _Signal):
                server.handle_exit(message.number, None)
            else:
                link.take(message)
        os.write(2, b"heron: the engine's process has ended, and with it the server\n")
        os._exit(1)

    try:
        offers = {name: offer._replace(tokenizer=made(spec, eod)) for name, (offer, spec, eod) in portable.items()}
        app = application(link, offers, config, None)
        server = server_of(app, config, lambda address: pipe.send(_Listening(address)))
        if next(pipe.received(), None) is None:
            return
        _be_quick()
        threading.Thread(target=read, args=(server,), name="heron-pipe", daemon=True).start()
        server.run()
    except (HeronError, OSError) as error:
        pipe.send(error)
