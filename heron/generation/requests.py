"""What is asked of an engine, what it gives, and the sequences that it has open."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from heron.config import LARGEST_SEED
from heron.config.settings import plain
from heron.errors import ConfigError, DataError
from heron.generation.constraint import Constraint
from heron.generation.extras import Extras
from heron.generation.sampling import Sampling, Token
from heron.generation.snapshot import Snapshot
from heron.generation.text import TextWriter, UntilStop
from heron.model import State
from heron.tokenizer import Tokenizer
from heron.tokenizer.continuation import encode_behind

LARGEST_BIAS = 100.0
MOST_LIKELIEST = 20


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
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    """Numbers from -100 to 100 that are added to the logits of ids before anything else; -100 all but bars an id."""
    logprobs: int | None = None
    """How many of the likeliest tokens :attr:`Token.top` gives with each token, 0 to 20; None: none. Their logprobs, as
    :attr:`Token.logprob`, are the model's own: before biases, the constraint, penalties and sampling settings."""
    constraint: Constraint | None = None
    """What may come next, token by token; the request can be served once, since it is moved on. Ids that end the text
    are drawn where it is over."""
    marks: Sequence[int] = ()
    """Numbers of prompt ids, those pending in `after` not counted, behind which a snapshot is kept while the prompt is
    read: :attr:`OpenSequence.snapshots`. From 1 on, before the last id. A piece ends at each, so a prompt that goes on
    from one of them, with the same marks behind it, is read by the same pieces, hence to the same bits."""

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
        check_bias(self.logit_bias, tokenizer.vocab_size)
        wanted = plain(self.logprobs)
        if wanted is not None and (type(wanted) is not int or not 0 <= wanted <= MOST_LIKELIEST):
            raise ConfigError(f"logprobs: wanted a whole number from 0 to {MOST_LIKELIEST}, or None, got {wanted!r}")
        parts = ("allowed", "accept", "is_over")
        if self.constraint is not None and not all(hasattr(self.constraint, part) for part in parts):
            got = type(self.constraint).__name__
            raise ConfigError(f"constraint: wanted one with {', '.join(parts)}, got {got}")

    def extras(self, tokenizer: Tokenizer) -> Extras | None:
        """What drawing must do for it beyond its sampling; None: nothing."""
        if not self.logit_bias and self.constraint is None and not self.logprobs:
            return None
        ends = {*self.stop_ids, *(() if tokenizer.eod is None else (tokenizer.eod,))}
        ends = [token for token in sorted(ends) if token < tokenizer.vocab_size]
        return Extras(dict(self.logit_bias), self.constraint, ends, self.logprobs or 0)


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
        snapshots: by mark of its request, those that reading has come to; they stay when it is closed.
        sampling, extras, counts, generator: how its tokens are drawn, what is asked for beside, the occurrences of
            tokens (V,), the random numbers.
    """

    def __init__(
        self,
        place: int,
        unread: list[int],
        state: State | None,
        request: Request,
        extras: Extras | None,
        counts: Tensor | None,
        generator: torch.Generator,
        text: TextWriter,
    ):
        self.text, self.is_open, self.place = text, True, place
        self.sampling, self.extras, self.counts, self.generator = request.sampling, extras, counts, generator
        self.snapshots: dict[int, Snapshot] = {}
        self._marks = frozenset(request.marks)
        self._n_read = -len(request.after.pending) if request.after is not None else 0  # ids of the prompt
        self.unread, self.state = unread, state

    @property
    def is_read(self) -> bool:
        """Whether its prompt was read, so that every step draws a token for it."""
        return len(self.unread) == 1

    @property
    def n_readable(self) -> int:
        """How many ids of its prompt may be read at once: those before the last one, up to the next mark."""
        return min([len(self.unread) - 1, *(mark - self._n_read for mark in self._marks if mark > self._n_read)])

    def has_read(self, n: int, state: State | None) -> None:
        """Note that the engine has read the next `n` ids of the prompt, and is at `state`."""
        n_read, unread = self._n_read + n, self.unread[n:]
        if n_read in self._marks:
            self.snapshots[n_read] = Snapshot(state and state.clone())
        self._n_read, self.unread, self.state = n_read, unread, state if len(unread) > 1 else None

    def go_on(self, token: int) -> None:
        """Note the token that was drawn."""
        self.unread, self.state = [token], None

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


def check_bias(bias: Mapping[int, float], n_ids: int) -> None:
    """ConfigError unless it gives ids below `n_ids` numbers from -LARGEST_BIAS to LARGEST_BIAS."""
    if not isinstance(bias, Mapping):
        raise ConfigError(f"logit_bias: wanted a mapping of ids to numbers, got {type(bias).__name__}")
    for token, value in bias.items():
        if type(token) is not int or not 0 <= token < n_ids:
            raise ConfigError(f"logit_bias: wanted ids from 0 to {n_ids - 1}, got {token!r}")
        if type(value) not in (int, float) or not abs(value) <= LARGEST_BIAS:  # NaN is not
            raise ConfigError(
                f"logit_bias: wanted numbers from {-LARGEST_BIAS:g} to {LARGEST_BIAS:g}, got {value!r} for id {token}"
            )


def check_marks(marks: Sequence[int], n_ids: int) -> None:
    """ConfigError unless they are whole numbers from 1 on, before the last of a prompt's `n_ids` ids."""
    for mark in marks:
        if type(mark) is not int or not 1 <= mark < n_ids:
            raise ConfigError(f"marks: wanted whole numbers from 1 on, before the last of {n_ids} ids, got {mark!r}")


def check_seed(seed: int) -> None:
    """ConfigError unless it is a whole number from 0 to LARGEST_SEED."""
    if type(plain(seed)) is not int or not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"seed: wanted a whole number from 0 to {LARGEST_SEED}, got {seed!r}")
