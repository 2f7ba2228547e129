"""A conversation with a model in the terminal, in the template that RWKV models are trained with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

from heron.data.template import STOP, THINKING, Message, RwkvTemplate, cleaned, is_control
from heron.errors import ConfigError, HeronError, did_you_mean
from heron.generation import Engine, Request, Sampling, Snapshot
from heron.generation.requests import check_max_tokens
from heron.tokenizer.continuation import encode_behind

HELP = """/reset        forget the conversation
/save FILE    keep what the model remembers in a file
/load FILE    go on from such a file
/retry        another answer to the last message
/help         this list
/quit         leave (also the end of the input, or Ctrl-C)
Ctrl-C cuts an answer short. A message that begins with a slash: type two."""


class _Read(NamedTuple):
    """What the model has read of a conversation."""

    memory: Snapshot
    text: str  # since the conversation began, or was loaded
    ids: list[int]  # of that text


class Chat:
    """One conversation. The model reads each turn once and remembers it in its state.

    What it reads turn by turn are the ids of the whole conversation, encoded as one text; where a turn's ids can't be
    told from those (behind a loaded file the text before is not known), those of a text that goes on, see
    :func:`heron.tokenizer.continuation.encode_behind`.

    Args:
        engine: with a free place.
        sampling, max_tokens, seed: of the answers; each answer counts the seed up by one.
        system: what the conversation is about, for the model; empty: nothing.
        think: "on" opens every answer with a thought, "short" and "long" also ask for one of that length, "off" opens
            it with an empty thought, "" leaves it to the model.

    Raises:
        ConfigError: an unknown `think`, or a tokenizer of integers.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        max_tokens: int = 1000,
        seed: int = 0,
        system: str = "",
        think: str = "",
    ):
        if not engine.tokenizer.is_text:
            raise ConfigError(
                f"chat: the template is text, and the tokenizer {engine.tokenizer.spec} has numbers only; "
                'use heron generate, as in --prompt "4 325"'
            )
        if think not in THINKING:
            raise ConfigError(f"think: wanted on, off, short, long or nothing, got {think!r}")
        check_max_tokens(max_tokens)
        self._engine, self._sampling, self._max_tokens, self._seed = engine, sampling, max_tokens, seed
        self._system = [Message("system", system)] if cleaned(system) else []
        self._think = think
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system text."""
        self._begin(Snapshot(None))

    def _begin(self, start: Snapshot) -> None:
        self._start = start  # what was there before the first turn
        self._before = _Read(start, "", [])  # the memory from before the last message
        self._turn = self._answer = ""  # the last message as the model reads it, and its answer so far

    def say(self, message: str) -> Generator[str]:
        """The answer to `message`, piece by piece. Where the iterator is closed early, the model remembers that much.

        Raises:
            ConfigError: a message without a character.
            DataError: a message that the tokenizer cannot encode.
        """
        if not cleaned(message):
            raise ConfigError("the message is empty")
        before = self._settled()
        start = self._system if before.memory.state is None else []
        turn = RwkvTemplate().prompt([*start, Message("user", message)], think=self._think)
        pieces = self._answered(before, turn)  # refuses what cannot be read before anything changes
        self._before, self._turn, self._answer = before, turn, ""
        return self._remembered(pieces)

    def retry(self) -> Generator[str]:
        """Another answer to the last message, as if the one before had not been given.

        Raises:
            ConfigError: nothing was said yet.
        """
        if not self._turn:
            raise ConfigError("there is no message to answer again")
        pieces = self._answered(self._before, self._turn)
        self._answer = ""
        return self._remembered(pieces)

    def save(self, path: str | Path) -> None:
        """Write what the model remembers of the conversation. CheckpointError as in :meth:`heron.Engine.save`."""
        self._engine.save(self._settled().memory, path)

    def load(self, path: str | Path) -> None:
        """Go on from a saved conversation. CheckpointError as in :meth:`heron.Engine.load`."""
        self._begin(self._engine.load(path))

    def _settled(self) -> _Read:
        """The memory with the last message and its answer, read as they stand in the template."""
        if not self._turn:
            return self._before
        memory, text, ids = self._before
        new = f"{self._turn}{self._answer.rstrip()}\n\n"
        new_ids = self._ids(self._before, new, followed_by="User:")
        state = self._engine.prefill([*memory.pending, *new_ids], memory.state)
        return _Read(Snapshot(state), text + new, [*ids, *new_ids])

    def _answered(self, before: _Read, turn: str) -> Generator[str]:
        ids = self._ids(before, turn)
        pieces = self._engine.stream(Request(ids, self._max_tokens, self._sampling, STOP, self._seed, before.memory))
        self._seed += 1
        return pieces

    def _ids(self, before: _Read, new: str, followed_by: str = "") -> list[int]:
        """The ids of `new` behind what was read, as they stand in the whole conversation, `followed_by` behind them."""
        tokenizer = self._engine.tokenizer
        whole = self._whole(before.text + new + followed_by)
        if followed_by:
            tail = encode_behind(tokenizer, (), followed_by)
            whole = whole[: -len(tail)] if whole[-len(tail) :] == tail else self._whole(before.text + new)
        n = len(before.ids)
        return whole[n:] if whole[:n] == before.ids else encode_behind(tokenizer, before.ids, new)

    def _whole(self, text: str) -> list[int]:
        """The ids of the text so far, after those of the history."""
        if self._start.state is None and not self._start.pending:
            return self._engine.tokenizer.encode(text)
        return encode_behind(self._engine.tokenizer, self._start.pending, text)

    def _remembered(self, pieces: Generator[str]) -> Generator[str]:
        with contextlib.closing(pieces):
            for piece in pieces:
                self._answer += piece
                yield piece


def printable(text: str) -> str:
    """`text` with every character that could act on a terminal shown as a picture or U+FFFD; newline and tab stay.

    CR LF, which ends the lines of many texts, is a newline.
    """
    return "".join(c if c in "\n\t" or not is_control(c) else _picture(c) for c in text.replace("\r\n", "\n"))


def printable_so_far(text: str) -> tuple[str, str]:
    """:func:`printable` of a text that goes on, and what has to wait: a CR at its end, behind which LF may come."""
    held = "\r" if text.endswith("\r") else ""
    return printable(text.removesuffix(held)), held


def run(chat: Chat, read: Callable[[str], str], write: Callable[[str], None]) -> None:
    """Talk until the input ends. `read` shows a prompt and gives a line, `write` shows text at once."""
    while True:
        try:
            line = read("\nUser: ").strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if line == "/quit":
            return
        try:
            _act(chat, line, write)
        except (HeronError, OSError) as error:  # whatever it is, the conversation goes on
            write(f"{printable(str(error))}\n")
        except KeyboardInterrupt:  # while the turns so far are read; nothing is lost
            write(" [cut short]\n")


def _act(chat: Chat, line: str, write: Callable[[str], None]) -> None:
    if not line.startswith("/") or line.startswith("//"):
        if cleaned(line):
            _show(chat.say(line.removeprefix("/") if line.startswith("//") else line), write)
        return
    command, _, rest = line.partition(" ")
    files, others = ("/save", "/load"), ("/reset", "/retry", "/help", "/quit")
    if command in files and not rest.strip():
        raise ConfigError(f"{command}: wanted a file, as in {command} talk.safetensors")
    if command in others and rest.strip():
        raise ConfigError(f"{command} takes nothing behind it")
    if command == "/save":
        chat.save(Path(rest.strip()).expanduser())
        write(f"saved {rest.strip()}\n")
    elif command == "/load":
        chat.load(Path(rest.strip()).expanduser())
        write(f"loaded {rest.strip()}\n")
    elif command == "/reset":
        chat.reset()
        write("forgotten\n")
    elif command == "/retry":
        _show(chat.retry(), write)
    elif command == "/help":
        write(HELP + "\n")
    else:
        known = (*files, *others)
        raise ConfigError(f"no command {command!r}.{did_you_mean(command, known)} There are {', '.join(known)}")


def _show(pieces: Generator[str], write: Callable[[str], None]) -> None:
    write("\nAssistant:")
    held = ""  # line ends: those behind the answer are not shown
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                text = held + piece
                certain = text.rstrip("\r\n")
                held = text.removeprefix(certain)
                write(printable(certain))
    except KeyboardInterrupt:
        write(" [cut short]")
    write("\n")


def _picture(control: str) -> str:
    if ord(control) < 0x20:
        return chr(0x2400 + ord(control))
    return "\N{SYMBOL FOR DELETE}" if control == "\x7f" else "\N{REPLACEMENT CHARACTER}"
