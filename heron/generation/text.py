"""Stop texts, no part of which is given out, and ids that stand for no text at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from heron.errors import ConfigError, DataError
from heron.tokenizer import Tokenizer


class UntilStop:
    """Lets text through up to the first stop text, holding back whatever could still become one."""

    def __init__(self, stops: str | Sequence[str]):
        stops = tuple(stops) if isinstance(stops, Iterable) and not isinstance(stops, str) else (stops,)
        if not all(isinstance(stop, str) for stop in stops):
            raise ConfigError(f"stop: wanted texts, got {stops!r}")
        if "" in stops:
            raise ConfigError("stop: wanted texts of at least one character, got an empty one")
        self.found = False
        self._stops = stops
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


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, less than all of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def stand_for_something(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """False if a hole in the vocabulary is among `ids`, such as 65530 to 65535 of World, which models do draw."""
    try:
        tokenizer.decode_bytes(ids)
    except DataError:
        return False
    return True
