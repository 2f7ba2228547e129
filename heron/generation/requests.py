"""What is asked of an engine, what it gives, and the way from its tokens to text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from heron.config import LARGEST_SEED, plain
from heron.errors import ConfigError
from heron.generation.sampling import Sampling
from heron.generation.text import until_stop
from heron.model import State
from heron.tokenizer import TextStream, Tokenizer


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Everything that decides what a row says next; it can go on in any number of rows, and in a file.

    A prompt cache is a snapshot with a `state` and perhaps `pending` ids alone.
    """

    state: State | None
    """What was read, batch size 1, on any device; None: nothing."""
    pending: tuple[int, ...] = ()
    """Ids that are still to be read, in a row the last one drawn."""
    counts: Tensor | None = None
    """(V,) fp32 decayed occurrences of each token for the penalties; None: none yet."""
    generator: Tensor | None = None
    """State of the row's random generator; None: a new row's seed decides."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A text that is wanted from :meth:`Engine.run`."""

    prompt: str | Sequence[int] = ""
    """Text or ids. Empty, and nothing pending in `after`: starts from the end of a document, as training does."""
    max_tokens: int = 64
    """Most new tokens, at least 0."""
    sampling: Sampling = Sampling()
    """How its tokens are drawn; every request may have its own."""
    stop: str | Sequence[str] = ()
    """Texts that end it; looked for in the new text only, and not given out. Of integers: whole numbers."""
    seed: int = 0
    """Same seed, same text, whatever else is running."""
    after: Snapshot | None = None
    """What comes before the prompt; a text goes on there by :func:`heron.tokenizer.continuation.encode_behind`."""
    stop_ids: Sequence[int] = ()
    """Ids that end it and are not given out, as the end of a document does."""

    def check(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """ConfigError for a setting that no engine with this tokenizer and so many ids could serve."""
        if not isinstance(self.sampling, Sampling):
            raise ConfigError(f"sampling: wanted a Sampling, got {type(self.sampling).__name__}")
        if not isinstance(self.after, Snapshot | None):
            raise ConfigError(f"after: wanted a Snapshot, got {type(self.after).__name__}")
        if self.after is not None and not isinstance(self.after.state, State | None):
            raise ConfigError(f"state: wanted a heron.State, got {type(self.after.state).__name__}")
        check_max_tokens(self.max_tokens)
        check_seed(self.seed)
        until_stop(tokenizer, self.stop)
        ids = self.stop_ids
        whole = np.iterable(ids) and all(type(i) is int or isinstance(i, np.integer) for i in ids)
        if not whole or not all(0 <= i < vocab_size for i in ids):
            raise ConfigError(f"stop_ids: wanted ids from 0 to {vocab_size - 1}, got {ids!r:.80}")


class Token(NamedTuple):
    """One drawn token."""

    id: int
    logprob: float  # natural logarithm of its probability under the model, before penalties and sampling settings


class Piece(NamedTuple):
    """What :meth:`Engine.run` gives of a request at one step."""

    request: int  # its number, from 0
    text: str  # what became certain: whole characters, no part of a stop text; often empty
    token: Token | None  # None where nothing was drawn (max_tokens 0)
    finish: str | None  # None: goes on; "end" (of document), "stop" (a text or an id) or "length"


class Writing:
    """A request on its way from tokens to text."""

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer, before: list[int]):
        self._number, self._left, self._eod = number, request.max_tokens, tokenizer.eod
        self._stop_ids = frozenset(request.stop_ids)
        # An end of document alone is where an empty prompt starts: no text is in front.
        self._text = TextStream(tokenizer, () if before == [tokenizer.eod] else before)
        self._until_stop = until_stop(tokenizer, request.stop)

    def push(self, token: Token) -> Piece:
        """What the next token gives."""
        self._left -= 1
        text = ""
        if token.id == self._eod:
            finish = "end"
        elif token.id in self._stop_ids:
            finish = "stop"
        else:
            text = self._until_stop.push(self._text.push(token.id))
            finish = "stop" if self._until_stop.found else None if self._left else "length"
        if finish and not self._until_stop.found:
            text += self._until_stop.push(self._text.flush()) + self._until_stop.flush()
        return Piece(self._number, text, token, finish)


def check_max_tokens(max_tokens: int) -> None:
    """ConfigError unless it is a whole number from 0 on."""
    if type(plain(max_tokens)) is not int or max_tokens < 0:
        raise ConfigError(f"max_tokens: wanted a whole number from 0 on, got {max_tokens!r}")


def check_seed(seed: int) -> None:
    """ConfigError unless it is a whole number from 0 to LARGEST_SEED."""
    if type(plain(seed)) is not int or not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"seed: wanted a whole number from 0 to {LARGEST_SEED}, got {seed!r}")
