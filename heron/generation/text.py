"""Stop texts, no part of which is given out, and ids that stand for no text at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from heron.errors import ConfigError, DataError
from heron.tokenizer import TextStream, Tokenizer


def until_stop(tokenizer: Tokenizer, stops: str | Sequence[str]) -> UntilStop | UntilWords:
    """What holds back the text of `tokenizer` from its first stop text on: cut anywhere, or between integers.

    Raises:
        ConfigError: an empty stop text, or one that the tokenizer of integers cannot encode.
    """
    texts = (stops,) if isinstance(stops, str) or not isinstance(stops, Iterable) else tuple(stops)
    if not all(isinstance(stop, str) for stop in texts):
        raise ConfigError(f"stop: wanted a text or several, got {stops!r:.80}; ids are for stop_ids")
    if tokenizer.is_text:
        return UntilStop(texts)
    try:
        ids = [tokenizer.encode(stop) for stop in texts]
    except DataError as error:
        raise ConfigError(f"stop: {error}") from None
    return UntilWords([[tokenizer.decode([token]) for token in stop] for stop in ids])


class UntilStop:
    """Lets text through up to the first stop text, holding back whatever could still become one."""

    def __init__(self, stops: Sequence[str]):
        if "" in stops:
            raise ConfigError("stop: wanted texts of at least one character, got an empty one")
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """Take in a piece and give what is certain to come before any stop text."""
        if self.found:
            return ""
        held = self._held + piece
        # The stop text that is complete first wins, so that the result does not depend on how the text was cut.
        matches = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if matches:
            self.found = True
            n_certain = min(matches)[1]
        else:
            n_certain = len(held) - max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[n_certain:]
        return held[:n_certain]

    def flush(self) -> str:
        """What was held back, now that nothing follows; empty after a stop text."""
        return "" if self.found else self._held


class UntilWords:
    """The same where every piece is one word, with its separator: a stop text is a run of whole words."""

    def __init__(self, stops: Sequence[Sequence[str]]):
        if not all(stops):
            raise ConfigError("stop: wanted texts of at least one word, got an empty one")
        self.found = False
        self._stops = [list(stop) for stop in stops]
        self._held: list[str] = []

    def push(self, piece: str) -> str:
        """Take in a piece, or nothing, and give what is certain to come before any stop text."""
        if self.found or not piece:
            return ""
        self._held.append(piece)
        words = [held.strip() for held in self._held]
        ends = [stop for stop in self._stops if words[-len(stop) :] == stop]
        self.found = bool(ends)
        n_held = max(map(len, ends)) if ends else max((_overlap(words, stop) for stop in self._stops), default=0)
        n_certain = len(words) - n_held
        certain, self._held = self._held[:n_certain], self._held[n_certain:]
        return "".join(certain)

    def flush(self) -> str:
        """What was held back, now that nothing follows; empty after a stop text."""
        return "" if self.found else "".join(self._held)


def _overlap(text: str | list[str], stop: str | list[str]) -> int:
    """Length of the longest end of `text` with which `stop` begins, less than all of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text[-n:] == stop[:n]), 0)


def text_of(token: int, before: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of one token as it stands behind the ids `before`; bytes that are no character as ``\\xe4``."""
    if tokenizer.byte_level or not tokenizer.is_text:
        return tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")
    stream = TextStream(tokenizer, before)
    return stream.push(token) + stream.flush()


def stand_for_something(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """False if a hole in the vocabulary is among `ids`, such as 65530 to 65535 of World, which models do draw."""
    try:
        tokenizer.decode_bytes(ids)
    except DataError:
        return False
    return True
