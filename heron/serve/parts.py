"""What a model has written, taken apart as it comes: its thought, its answer, the functions that it calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

from heron import strict_json
from heron.serve.grammar import CALL_CLOSING, CALL_OPENING

_THOUGHT, _END_OF_THOUGHT = "<think>", "</think>"


class Call(NamedTuple):
    """A function that the model calls."""

    name: str
    arguments: str  # JSON


class Part(NamedTuple):
    """A piece of an answer: of one of the three kinds."""

    reasoning: str = ""
    content: str = ""
    call: Call | None = None


class Parts:
    """Takes the text of an answer apart, the inverse of what :mod:`heron.data.template` writes of a message.

    Args:
        opened: what the prompt has opened the answer with.
        has_tools: whether it may call functions.
    """

    def __init__(self, opened: str = "", has_tools: bool = False):
        self._has_tools = has_tools
        self._held = ""  # what may still become a marker
        self._read = self._beginning
        self.push(opened)

    def push(self, text: str) -> list[Part]:
        """The parts that became certain with more text."""
        self._held += text
        parts = []
        while (read := self._read) and (part := read()) is not None:
            parts.append(part)
        return [part for part in parts if part != _NOTHING]

    def flush(self) -> list[Part]:
        """What was held back, now that no text follows."""
        held, self._held = self._held, ""
        if self._read == self._thought:
            part = Part(reasoning=held.rstrip())
        elif self._read == self._beginning:
            part = Part(content=held.strip())
        else:
            part = Part(content=held)
        return [part] if part != _NOTHING else []

    # Each of these takes what is certain off the front of what is held, and gives None where more is needed.

    def _beginning(self) -> Part | None:
        text = self._held.lstrip()
        if text.startswith(_THOUGHT):
            return self._skip_to(self._thought, text[len(_THOUGHT) :])
        if _THOUGHT.startswith(text):
            return None
        self._held, self._read = text, self._content
        return _NOTHING

    def _thought(self) -> Part | None:
        before, found, behind = self._held.partition(_END_OF_THOUGHT)
        if found:
            self._skip_to(self._content, behind)
            return Part(reasoning=before.rstrip())
        return self._certain(_END_OF_THOUGHT, "reasoning")

    def _content(self) -> Part | None:
        if not self._has_tools:
            text, self._held = self._held, ""
            return Part(content=text) if text else None
        before, found, behind = self._held.partition(CALL_OPENING)
        if found:
            self._held, self._read = CALL_OPENING + behind, self._call
            return Part(content=before.rstrip())
        return self._certain(CALL_OPENING, "content")

    def _call(self) -> Part | None:
        block, found, behind = self._held.removeprefix(CALL_OPENING).partition(CALL_CLOSING)
        if not found:
            return None
        self._skip_to(self._content, behind)
        call = _call_of(block)
        return Part(content=CALL_OPENING + block + CALL_CLOSING) if call is None else Part(call=call)

    def _skip_to(self, read: Callable[[], Part | None], held: str) -> Part:
        """Go on with what is held, less the spaces and line breaks in front of it, which are still to come perhaps."""

        def skip() -> Part | None:
            self._held = self._held.lstrip()
            if not self._held:
                return None
            self._read = read
            return _NOTHING

        self._held, self._read = held, skip
        return _NOTHING

    def _certain(self, marker: str, kind: str) -> Part | None:
        """Text that no marker, nor the space before one, can begin in."""
        held = self._held
        n = next((n for n in range(min(len(held), len(marker) - 1), 0, -1) if held.endswith(marker[:n])), 0)
        certain = held[: len(held) - n].rstrip()
        self._held = held[len(certain) :]
        if not certain:
            return None
        return Part(reasoning=certain) if kind == "reasoning" else Part(content=certain)


_NOTHING = Part()


def _call_of(block: str) -> Call | None:
    """The call in a JSON block; None: it is none, or one that an answer in JSON and UTF-8 cannot hold."""
    try:
        value = strict_json.lenient(block.encode())
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (value["name"] + arguments).encode()  # a ValueError for half a surrogate pair
    except ValueError:
        return None
    return Call(value["name"], arguments)
