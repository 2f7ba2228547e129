"""`heron serve`: a model behind OpenAI's interface, many texts at a time. Needs the `serve` extra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from heron.config.serve import ServeConfig
from heron.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from heron.data.template import Template
    from heron.generation import Engine
    from heron.model import State

__all__ = ["ServeConfig", "create_app"]


def create_app(
    engine: Engine,
    config: ServeConfig = ServeConfig(),  # noqa: B008 (frozen)
    engines: Mapping[str, Engine] = {},
    states: Mapping[str, State] = {},
    template: Template | None = None,
) -> FastAPI:
    """An ASGI application that serves a model; run it with one worker.

    Args:
        engine: of the model. From the start of the application to its end nobody else opens sequences in it.
        config: what requests may want; where the application listens is for its server to say.
        engines: of adapters and documents of a memory, by name: `model` "NAME:ADAPTER" in a request chooses one.
        states: tuned states of the model, by name, likewise chosen; they write in the same batch.
        template: of chats; None: what `config.template` names.

    Raises:
        ConfigError: the `serve` extra is not installed, two variants with one name, a state of another model.
    """
    try:
        from heron.serve.app import application
    except ImportError as error:
        raise ConfigError(
            f"heron serve needs packages that are not installed ({error}). Type: pip install 'heron-rwkv[serve]'"
        ) from None
    return application(engine, config, engines, states, template)
