"""From the ids of a sequence to its text: whole characters, up to a stop text, and why it ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from heron.errors import ConfigError, DataError
from heron.tokenizer import TextStream, Tokenizer


class TextWriter:
    """Turns the drawn ids of one sequence into text, each character as soon as it is certain, and says when it ends.

    The pieces that :meth:`push` gives join to the text behind the prompt's: whole characters, no part of a stop text.

    Args:
        tokenizer: of the ids.
        before: the prompt's ids, whose text is not given out. An end of document alone is where an empty prompt starts.
        stop: texts that end it; looked for in the new text only, and not given out. Of integers: whole numbers.
        stop_ids: ids that end it and are not given out, as the end of a document does.
        max_tokens: the number of ids after which it ends; None: any number.

    Attributes:
        finish: None while it goes on; then "end" (of document), "stop" (a text or an id) or "length".

    Raises:
        ConfigError: an empty stop text, or one that the tokenizer of integers cannot encode.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        before: Sequence[int] = (),
        stop: str | Sequence[str] = (),
        stop_ids: Iterable[int] = (),
        max_tokens: int | None = None,
    ):
        self.finish: str | None = None if max_tokens != 0 else "length"
        self._left, self._eod, self._stop_ids = max_tokens, tokenizer.eod, frozenset(stop_ids)
        self._characters = TextStream(tokenizer, () if list(before) == [tokenizer.eod] else before)
        self._until_stop = UntilStop(tokenizer, stop)

    def push(self, token: int) -> str:
        """The text that became certain with the next id, often none.

        Raises:
            ConfigError: the text has ended.
            DataError: an id that stands for nothing.
        """
        if self.finish is not None:
            raise ConfigError(f"text: it has ended ({self.finish}); begin another one for more ids")
        if token == self._eod:
            self.finish = "end"
        elif token in self._stop_ids:
            self.finish = "stop"
        else:
            text = self._until_stop.push(self._characters.push(token))
            if self._left is not None:
                self._left -= 1
            if self._until_stop.found:
                self.finish = "stop"
            elif self._left == 0:
                self.finish = "length"
            return text + self.flush() if self.finish else text
        return self.flush()

    def flush(self) -> str:
        """The text that was held back, now that no id follows: what might have become a stop text, and U+FFFD for an
        incomplete character. :meth:`push` has given it where the text has ended."""
        text = self._until_stop.push(self._characters.flush()) + self._until_stop.flush()
        if self._until_stop.found:
            self.finish = "stop"
        return text


class UntilStop:
    """Lets text through up to the first stop text, holding back whatever could still become one.

    The stop text that is complete first wins, so that the result does not depend on how the text was cut; of several
    that are complete at once, the longest. Under a tokenizer of integers every piece is one word, with its separator,
    and a stop text is a run of whole words.

    Raises:
        ConfigError: an empty stop text, or one that the tokenizer of integers cannot encode.
    """

    def __init__(self, tokenizer: Tokenizer, stops: str | Sequence[str]):
        texts = (stops,) if isinstance(stops, str) or not isinstance(stops, Iterable) else tuple(stops)
        if not all(isinstance(stop, str) for stop in texts):
            raise ConfigError(f"stop: wanted a text or several, got {stops!r:.80}; ids are for stop_ids")
        self.found = False
        self._is_text = tokenizer.is_text
        self._held: list[str] = []  # characters, or words with their separators
        try:
            self._stops = [
                list(stop) if self._is_text else [tokenizer.decode([token]) for token in tokenizer.encode(stop)]
                for stop in texts
            ]
        except DataError as error:
            raise ConfigError(f"stop: {error}") from None
        if not all(self._stops):
            part = "character" if self._is_text else "word"
            raise ConfigError(f"stop: wanted texts of at least one {part}, got an empty one")

    def push(self, piece: str) -> str:
        """Take in a piece, or nothing, and give what is certain to come before any stop text."""
        if self.found or not piece:
            return ""
        if not self._stops:
            return piece
        parts = self._held.copy() if self._is_text else [word.strip() for word in self._held]  # as they are compared
        for part in piece if self._is_text else [piece]:
            self._held.append(part)
            parts.append(part if self._is_text else part.strip())
            if ends := [len(stop) for stop in self._stops if parts[-len(stop) :] == stop]:
                self.found = True
                certain, self._held = self._held[: len(parts) - max(ends)], []
                return "".join(certain)
        n_certain = len(parts) - max(_overlap(parts, stop) for stop in self._stops)
        certain, self._held = self._held[:n_certain], self._held[n_certain:]
        return "".join(certain)

    def flush(self) -> str:
        """What was held back, now that nothing follows; empty after a stop text."""
        held, self._held = self._held, []
        return "".join(held)


def _overlap(text: list[str], stop: list[str]) -> int:
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
