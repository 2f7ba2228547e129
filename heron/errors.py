"""The one family of errors. Each message says what was wanted, what came, and what to type next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HeronError(Exception):
    """Base of every error that Heron raises on purpose. The command line prints it as one line and exits with 1."""


class ConfigError(HeronError):
    """A setting is unknown, out of range, or contradicts another one."""


class UnknownKeyError(ConfigError):
    """A config names a setting that does not exist; the command line exits with 2, as for an unknown flag."""


class DataError(HeronError):
    """A text, a dataset, a tokenizer or a token id is not what it should be."""


class CheckpointError(HeronError):
    """A weights file or a run folder is missing, damaged, or belongs to another model."""


class KernelError(HeronError):
    """An implementation of an operator was asked for that cannot run here, or was called with unfit tensors."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'n_layer'?"`` for the nearest of `known`, or ``""`` when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def counted(number: int, things: str) -> str:
    """``"1 step"``, ``"1,000 steps"``: a number of things, whose plural ends in s."""
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"
