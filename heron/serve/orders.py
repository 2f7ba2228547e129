"""What passes between HTTP and the engines, which may be in two processes: what is wanted, and what was drawn."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from heron.generation import Request, Token
from heron.serve.grammar import Grammar, Grammars


@dataclasses.dataclass(frozen=True)
class Start:
    """What a text begins from: nothing, a tuned state or a saved one."""

    key: str = ""  # in the prefix cache; that of a tuned state is its name
    state: str | None = None  # the saved one's name
    pending: tuple[int, ...] | None = None  # ids that are still to be read there; None: nothing comes before


@dataclasses.dataclass(frozen=True)
class Order:
    """A text that is wanted of an engine."""

    request: Request
    """With ids as its prompt, and without what the engines add: what comes before it, and its constraint."""
    seconds: float
    """After which it fails."""
    start: Start = Start()
    form: Callable[[Grammars], Grammar] | None = None
    """Makes its constraint."""
    keeps: bool = False
    """Whether the state behind its text is wanted for the prefix cache."""
    session: str | None = None
    """Under which the state behind its text is kept, once it has ended."""
    number: int = dataclasses.field(default_factory=functools.partial(next, itertools.count()))
    """What tells it from every other order of this process."""


class Drawn(NamedTuple):
    """What was drawn for an order since the last time."""

    number: int  # of the order
    text: str = ""
    n: int = 0  # tokens
    tokens: Sequence[Token] = ()  # them, where the request wants log-probabilities
    finish: str | None = None  # "end", "stop" or "length" with the last
    error: Exception | None = None  # instead of any more
    n_cached: int = 0  # tokens of the prompt that the prefix cache had read
