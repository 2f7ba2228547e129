"""`heron serve`: a model behind OpenAI's interface."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from pathlib import Path

from heron.commands.settings import given
from heron.commands.sources import engine_of
from heron.config.serve import NAME, ServeConfig, check_key
from heron.data import template, token_index
from heron.errors import ConfigError
from heron.generation import Engine
from heron.serve import serve

PACKED = 64  # short prompts that a GPU reads in one pass


def run(options: argparse.Namespace) -> None:
    settings = given(options, ServeConfig, "")
    config = _with_key(ServeConfig(**{"name": _name_of(options.model), **settings}))
    template.load(config.template)  # what is wrong with it is said before the model is read
    engine, _, states = engine_of(options, config.rows, PACKED, fit_steps=True)
    engines = {name: _adapted(options, path, config.rows) for name, path in options.with_adapter}
    engines |= {name: _remembering(options, engine, path, config.rows) for name, path in options.with_memory}
    serve(engine, config, engines, states)


def _with_key(config: ServeConfig) -> ServeConfig:
    """The settings with the key that the file holds."""
    if config.api_key_file is None:
        return config
    key = Path(config.api_key_file).read_text(encoding="utf-8", errors="replace").strip()
    check_key(key)
    return dataclasses.replace(config, api_key=key, api_key_file=None)


def _name_of(model: str) -> str | None:
    """The name of a model's file or folder, where that is one that a request may hold."""
    path = Path(model).resolve()
    name = path.stem if path.is_file() else path.name
    return name if NAME.fullmatch(name) else None


def _adapted(options: argparse.Namespace, folder: str, rows: int) -> Engine:
    changed = copy.copy(options)
    changed.adapter, changed.state, changed.with_state = folder, None, []
    if options.adapter is not None:
        raise ConfigError("with_adapter: --adapter is merged into the model already, and one adapter fits one base")
    return engine_of(changed, rows, PACKED, fit_steps=True).engine


def _remembering(options: argparse.Namespace, engine: Engine, file: str, rows: int) -> Engine:
    """The same weights with documents that their memory looks into."""
    if options.tables != "device":
        raise ConfigError(f"with_memory: wanted --tables device, got {options.tables}")
    documents = token_index.read(file, engine.tokenizer)
    return Engine(
        engine.model, engine.tokenizer, rows, documents=documents.index, fit_steps=True, states=options.states
    )
