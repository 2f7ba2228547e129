"""Heron trains and runs RWKV-8 "Heron" language models and their RWKV-7 ancestors.

Importing this package loads nothing but itself: each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ModelConfig": "heron.config",
    "TrainConfig": "heron.config",
    "FinetuneConfig": "heron.config",
    "HeronError": "heron.errors",
    "RWKV": "heron.model",
    "State": "heron.model",
    "load": "heron.checkpoint",
    "save": "heron.checkpoint",
    "build_optimizer": "heron.optim",
    "Trainer": "heron.train",
    "generate": "heron.generation",
    "Engine": "heron.generation",
}
_MODULES = (
    "checkpoint", "config", "data", "errors", "evaluate", "generation", "model", "ops", "optim", "serve", "tokenizer",
    "train",
)  # fmt: skip

__all__ = [*_HOMES, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll] - it reads literals alone


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"heron.{name}")
    raise AttributeError(f"module 'heron' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
