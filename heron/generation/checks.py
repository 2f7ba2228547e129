"""What an engine is built from, checked before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from heron.config.settings import plain
from heron.errors import ConfigError, did_you_mean
from heron.tables.store import PLACES


def check_parts(model: Any, tokenizer: Any) -> None:
    """ConfigError for what is no model or no tokenizer, or for two that don't fit together."""
    if not hasattr(model, "config") or not isinstance(model, nn.Module):
        raise ConfigError(f"model: wanted an RWKV, such as heron.load gives, got {type(model).__name__}")
    if not hasattr(tokenizer, "vocab_size") or isinstance(tokenizer, nn.Module):
        raise ConfigError(
            f"tokenizer: wanted a tokenizer, such as heron.tokenizer.load gives, got {type(tokenizer).__name__}"
        )
    config: Any = model.config
    n_ids, vocab_size = tokenizer.vocab_size, config.vocab_size
    if n_ids > vocab_size:
        raise ConfigError(
            f"the tokenizer has {n_ids} token ids, the model only {vocab_size} (its vocab_size); "
            "give the tokenizer that the model was trained with"
        )


def checked_number(name: str, number: int) -> int:
    """The number; ConfigError, with its name, unless it is a whole number from 1 on."""
    number = plain(number)
    if type(number) is not int or number < 1:
        raise ConfigError(f"{name}: wanted a whole number from 1 on, got {number!r}")
    return number


def in_bf16(states: str) -> bool:
    """Whether `states` is "bf16"; ConfigError unless it is that or "fp32"."""
    if states not in ("fp32", "bf16"):
        raise ConfigError(f"states: wanted fp32 or bf16, got {states!r}")
    return states == "bf16"


def check_tables(tables: str, tables_file: str | Path | None) -> None:
    """ConfigError for a place that tables cannot have, or one that does not go with `tables_file`."""
    if tables not in PLACES:
        raise ConfigError(f"tables: wanted {', '.join(PLACES)}, got {tables!r}.{did_you_mean(tables, PLACES)}")
    if (tables == "disk") != (tables_file is not None):
        raise ConfigError("tables: 'disk' needs a tables_file, and nothing else takes one")
