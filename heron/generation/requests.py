"""What is asked of an engine, what it gives, and the sequences that it has open."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from heron.config import LARGEST_SEED
from heron.config.settings import plain
from heron.errors import ConfigError, DataError
from heron.generation.sampling import Sampling, Token
from heron.generation.snapshot import Snapshot
from heron.generation.text import TextWriter, UntilStop
from heron.model import State
from heron.tokenizer import Tokenizer
from heron.tokenizer.continuation import encode_behind


@dataclasses.dataclass(frozen=True)
class Request:
    """A text that is wanted from :meth:`Engine.run` or :meth:`Engine.add`."""

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
        UntilStop(tokenizer, self.stop)
        ids = self.stop_ids
        whole = np.iterable(ids) and all(type(i) is int or isinstance(i, np.integer) for i in ids)
        if not whole or not all(0 <= i < vocab_size for i in ids):
            raise ConfigError(f"stop_ids: wanted ids from 0 to {vocab_size - 1}, got {ids!r:.80}")


class Piece(NamedTuple):
    """What :meth:`Engine.run` gives of a request at one step."""

    request: int  # its number, from 0
    text: str  # what became certain: whole characters, no part of a stop text; often empty
    token: Token | None  # None where nothing was drawn (max_tokens 0)
    finish: str | None  # None: goes on; "end" (of document), "stop" (a text or an id) or "length"


class OpenSequence:
    """A sequence that has a place in an engine: from :meth:`Engine.open` or :meth:`Engine.add` to :meth:`Engine.close`.

    Attributes:
        text: what turns its tokens into text. The engine pushes nothing to it.
        is_open: False once it was closed.
        place: its number among the engine's places.
        unread: the ids that are still to be read, the last of them by the step that draws the next token.
        state: behind what was read of a prompt; None at the start, and once the prompt was read.
        sampling, counts, generator: how its tokens are drawn, the occurrences of tokens (V,), the random numbers.
    """

    def __init__(
        self,
        place: int,
        unread: list[int],
        state: State | None,
        sampling: Sampling,
        counts: Tensor | None,
        generator: torch.Generator,
        text: TextWriter,
    ):
        self.text, self.is_open, self.place = text, True, place
        self.unread, self.state = unread, state
        self.sampling, self.counts, self.generator = sampling, counts, generator

    @property
    def is_read(self) -> bool:
        """Whether its prompt was read, so that every step draws a token for it."""
        return len(self.unread) == 1

    def go_on(self, unread: list[int], state: State | None = None) -> None:
        """Note what the engine has read, or drawn."""
        self.unread, self.state = unread, state

    def end(self) -> None:
        """Note that the engine has closed it."""
        self.is_open, self.state = False, None


def prompt_ids(prompt: str | Sequence[int], after: Snapshot | None, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """What :meth:`heron.Engine.prompt_ids` gives for a model of so many ids. Errors as there."""
    pending = () if after is None else after.pending
    if not isinstance(prompt, str) and (to_list := getattr(prompt, "tolist", None)) is not None:
        prompt = to_list()
    is_bytes = isinstance(prompt, bytes | bytearray)  # ids under the tokenizer of bytes, a mistake under others
    if not isinstance(prompt, Iterable) or (is_bytes and tokenizer.spec != "bytes"):
        raise DataError(f"prompt: wanted a text or token ids, got {type(prompt).__name__}")
    if not isinstance(prompt, str):
        ids = list(prompt)
    elif pending or (after is not None and after.state is not None):
        ids = encode_behind(tokenizer, pending, prompt)
    else:
        ids = tokenizer.encode(prompt)
    ids = [*pending, *ids]
    if not ids:
        if tokenizer.eod is None:
            raise ConfigError(
                "prompt: it is empty, and this tokenizer has no end-of-document token to start from; give some text"
            )
        ids = [tokenizer.eod]
    check_ids(ids, vocab_size)
    return ids


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """DataError, with the position, for what is no id of a model that knows so many."""
    for position, token in enumerate(ids):
        if not isinstance(token, numbers.Integral) or isinstance(token, bool):
            raise DataError(f"prompt: token {position} must be an id, a whole number, got {token!r}")
        if not 0 <= token < vocab_size:
            raise DataError(
                f"prompt: token {position} has id {token}, the model knows 0 to {vocab_size - 1} "
                f"(vocab_size {vocab_size}); give the tokenizer that the model was trained with"
            )


def check_max_tokens(max_tokens: int) -> None:
    """ConfigError unless it is a whole number from 0 on."""
    if type(plain(max_tokens)) is not int or max_tokens < 0:
        raise ConfigError(f"max_tokens: wanted a whole number from 0 on, got {max_tokens!r}")


def check_seed(seed: int) -> None:
    """ConfigError unless it is a whole number from 0 to LARGEST_SEED."""
    if type(plain(seed)) is not int or not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"seed: wanted a whole number from 0 to {LARGEST_SEED}, got {seed!r}")
