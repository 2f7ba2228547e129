"""A training run: the loop, its step, and what decides how it begins, goes on and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heron.train.loop import Trainer

__all__ = ["Trainer"]


def __getattr__(name: str) -> Any:
    if name == "Trainer":  # not before it is used: the rest of this package needs no torch
        from heron.train.loop import Trainer

        return Trainer
    raise AttributeError(f"module 'heron.train' has no attribute {name!r}")
