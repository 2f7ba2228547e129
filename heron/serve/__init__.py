"""`heron serve`: a model behind OpenAI's interface, many texts at a time. Needs the `serve` extra."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING

from heron.config.serve import ServeConfig
from heron.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from heron.data.template import Template
    from heron.generation import Engine
    from heron.model import State

__all__ = ["ServeConfig", "create_app", "serve"]


def create_app(
    engine: Engine,
    config: ServeConfig = ServeConfig(),  # noqa: B008 (frozen)
    engines: Mapping[str, Engine] = {},
    states: Mapping[str, State] = {},
    template: Template | None = None,
) -> FastAPI:
    """An ASGI application that serves a model; run it with one worker. HTTP and the engine share this process.

    Args:
        engine: of the model. From the start of the application to its end nobody else opens sequences in it.
        config: what requests may want; where the application listens is for its server to say.
        engines: of adapters and documents of a memory, by name: `model` "NAME:ADAPTER" in a request chooses one.
        states: tuned states of the model, by name, likewise chosen; they write in the same batch.
        template: of chats; None: what `config.template` names.

    Raises:
        ConfigError: the `serve` extra is not installed, two variants with one name, a state of another model.
    """
    with _extra():
        from heron.serve.app import application
        from heron.serve.engines import Engines
        from heron.serve.link import Direct
    offered = Engines(config, engine, engines, states)
    return application(Direct(offered), offered.offers, config, template)


def serve(
    engine: Engine,
    config: ServeConfig = ServeConfig(),  # noqa: B008 (frozen)
    engines: Mapping[str, Engine] = {},
    states: Mapping[str, State] = {},
    listening: Callable[[str], object] = lambda address: print(f"listening on {address}", flush=True),
) -> None:
    """Serve a model, with HTTP in a process of its own, until SIGINT or SIGTERM ends it in order.

    Call it from the main thread, in a program whose main module does nothing when it is imported.

    Args:
        engine, engines, states: as in :func:`create_app`. Their tokenizers are those of :func:`heron.tokenizer.load`.
        config: where to listen, and what requests may want.
        listening: is called with the address once it accepts, in another thread.

    Raises:
        ConfigError: as in :func:`create_app`, or it cannot listen there.
        HeronError: HTTP has ended otherwise.
    """
    with _extra():
        from heron.serve.app import application  # noqa: F401 - as the other process will
        from heron.serve.engines import Engines
        from heron.serve.processes import HttpProcess
    offered = Engines(config, engine, engines, states)
    with HttpProcess(config, offered.offers) as http:
        offered.warm_up()
        http.run(offered, listening)


@contextlib.contextmanager
def _extra() -> Generator[None]:
    """An import of what the `serve` extra brings."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"heron serve needs packages that are not installed ({error}). Type: pip install 'heron-rwkv[serve]'"
        ) from None
