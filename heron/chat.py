"""A conversation with a model in the terminal, in the template that RWKV models are trained with.

Template: BlinkDL/RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from heron.errors import ConfigError, HeronError, did_you_mean
from heron.generation import Engine, Request, Sampling, Snapshot
from heron.generation.engine import check_max_tokens

THINKING = {"": "", "on": " <think", "off": " <think>\n</think"}
STOP = "\n\nUser:"

HELP = """/reset        forget the conversation
/save FILE    keep what the model remembers in a file
/load FILE    go on from such a file
/retry        another answer to the last message
/help         this list
/quit         leave (also the end of the input, or Ctrl-C)
Ctrl-C cuts an answer short. A message that begins with a slash: type two."""


class Chat:
    """One conversation. The model reads each turn once and remembers it in its state.

    Args:
        engine: with a free row.
        sampling, max_tokens, seed: of the answers; each answer counts the seed up by one.
        system: what the conversation is about, for the model; empty: nothing.
        think: "on" opens every answer with a thought, "off" with an empty one, "" leaves it to the model.

    Raises:
        ConfigError: an unknown `think`.
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
        if think not in THINKING:
            raise ConfigError(f"think: wanted on, off or nothing, got {think!r}")
        check_max_tokens(max_tokens)
        self._engine, self._sampling, self._max_tokens, self._seed = engine, sampling, max_tokens, seed
        self._system = f"System: {cleaned(system)}\n\n" if cleaned(system) else ""
        self._opening = THINKING[think]
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system text."""
        self._before = Snapshot(None)  # what the model remembers from before the last message
        self._turn = self._answer = ""  # the last message as the model reads it, and its answer so far

    def say(self, message: str) -> Iterator[str]:
        """The answer to `message`, piece by piece. Where the iterator is closed early, the model remembers that much.

        Raises:
            ConfigError: a message without a character.
            DataError: a message that the tokenizer cannot encode.
        """
        if not cleaned(message):
            raise ConfigError("the message is empty")
        before = self._settled()
        start = self._system if before.state is None else ""
        turn = f"{start}User: {cleaned(message)}\n\nAssistant:{self._opening}"
        pieces = self._answered(before, turn)  # refuses what cannot be read before anything changes
        self._before, self._turn, self._answer = before, turn, ""
        return self._remembered(pieces)

    def retry(self) -> Iterator[str]:
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
        self._engine.save(self._settled(), path)

    def load(self, path: str | Path) -> None:
        """Go on from a saved conversation. CheckpointError as in :meth:`heron.Engine.load`."""
        self._before = self._engine.load(path)
        self._turn = self._answer = ""

    def _settled(self) -> Snapshot:
        """The memory with the last message and its answer, read as they stand in the template."""
        if not self._turn:
            return self._before
        encode = self._engine.tokenizer.encode
        ids = [*self._before.pending, *encode(self._turn), *encode(self._answer.rstrip() + "\n\n")]
        return Snapshot(self._engine.prefill(ids, self._before.state))

    def _answered(self, before: Snapshot, turn: str) -> Iterator[str]:
        request = Request(turn, self._max_tokens, self._sampling, STOP, self._seed, before)
        pieces = self._engine.stream(request)
        self._seed += 1
        return pieces

    def _remembered(self, pieces: Iterator[str]) -> Iterator[str]:
        with contextlib.closing(pieces):
            for piece in pieces:
                self._answer += piece
                yield piece


def cleaned(text: str) -> str:
    """A message as the template has it: no control characters, no empty lines, no space around it."""
    text = text.replace("\r\n", "\n")
    text = "".join(c for c in text if c in "\n\t" or not _is_control(c))
    return re.sub(r"\n{2,}", "\n", text).strip()


def printable(text: str) -> str:
    """`text` with every character that could act on a terminal shown as a picture or U+FFFD; newline and tab stay."""
    return "".join(c if c in "\n\t" or not _is_control(c) else _picture(c) for c in text)


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


def _show(pieces: Iterator[str], write: Callable[[str], None]) -> None:
    write("\nAssistant:")
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                write(printable(piece))
    except KeyboardInterrupt:
        write(" [cut short]")
    write("\n")


def _is_control(character: str) -> bool:
    """Whether a character is one for the terminal, or turns the direction of writing."""
    return unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in (
        "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI",
    )  # fmt: skip


def _picture(control: str) -> str:
    if ord(control) < 0x20:
        return chr(0x2400 + ord(control))
    return "\N{SYMBOL FOR DELETE}" if control == "\x7f" else "\N{REPLACEMENT CHARACTER}"
