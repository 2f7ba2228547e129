"""Text to token ids and back: World, bytes, integers and `tokenizer.json` files, behind one small protocol."""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from heron.errors import ConfigError, DataError, did_you_mean
from heron.tokenizer import document_end
from heron.tokenizer.checks import check_text, checked_ids, id_dtype, listed_ids, needed_package, utf8
from heron.tokenizer.json_file import JsonTokenizer
from heron.tokenizer.world import WorldTokenizer

SPECS = ("world", "bytes", "integers:V", "integers:V:E", "path/tokenizer.json")
LEARNED = "bpe:"  # in a TrainConfig, "bpe:V" is learned from the training text and becomes a tokenizer.json
_WINDOW = 16  # ids that decide how the next one is written, and more


class Tokenizer(Protocol):
    """What every tokenizer has; an own class with these members works wherever Heron takes a tokenizer.

    Attributes:
        spec: what :func:`load` takes to make this tokenizer again.
        vocab_size: every id is below it.
        eod: id of the end of a document, or None; in a text tokenizer it stands for no text at all.
        is_text: ids stand for text, so that ``decode(encode(text)) == text`` and bytes of text can be counted.
            False for integers: each id is a word of its own there, and how the words were spaced is not kept.
        byte_level: the bytes of a sequence are the bytes of its ids, one after another.
    """

    spec: str
    vocab_size: int
    eod: int | None
    is_text: bool
    byte_level: bool

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end of document. DataError, with the position, when it cannot be encoded."""
        ...

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as a 1-D integer array of a dtype just wide enough; it may be read-only."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, invalid UTF-8 replaced by U+FFFD. DataError for an id that stands for nothing."""
        ...

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The UTF-8 bytes of `ids`; they may begin or end inside a character. DataError as in `decode`."""
        ...


def load(spec: str | Path, eod: str | int | None = None) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
        spec: ``"world"`` (RWKV World, 65,536 ids), ``"bytes"`` (256), ``"integers:V"`` (whitespace-separated integers
            below V; ``"integers:V:E"`` names E as the end of document), or the path of a `tokenizer.json`.
        eod: what ends a document: an id, as a number or its digits, or a token of a `tokenizer.json`. None: see
            :func:`heron.tokenizer.document_end.find`. World and bytes have 0.

    Raises:
        ConfigError: `spec` is none of these, or the package that it needs is not installed; an `eod` that it has not.
        DataError: the file is missing or damaged.
    """
    if not isinstance(spec, str | os.PathLike):
        raise ConfigError(f"tokenizer: wanted a name or a path, got {type(spec).__name__}")
    spec, eod = os.fspath(spec), None if eod is None else str(eod)
    if spec in ("world", "bytes"):
        if eod not in (None, "0"):
            raise ConfigError(f"eod {eod!r}: under the tokenizer {spec} a document ends with id 0; drop it")
        return _world() if spec == "world" else ByteTokenizer()
    if spec.split(":")[0] == "integers":
        named = IntegerTokenizer(f"{spec}:{eod}" if eod is not None and spec.count(":") == 1 else spec)
        if eod not in (None, str(named.eod)):
            raise ConfigError(f"tokenizer {spec} has the end of document {named.eod}, eod is {eod!r}; drop one")
        return named
    if spec.endswith(".json") or Path(spec).is_file():
        return JsonTokenizer(spec, eod)
    if Path(spec, "tokenizer.json").is_file():
        raise ConfigError(f"tokenizer {spec!r} is a folder; name its file, {Path(spec, 'tokenizer.json')}")
    if f"{spec}:" == LEARNED:
        raise ConfigError(f"tokenizer {spec}: wanted its size, too, as in {spec}:512, which heron train learns")
    if spec.startswith(LEARNED):
        raise ConfigError(f"tokenizer {spec}: only heron train learns it; name the tokenizer.json of the run instead")
    raise ConfigError(f"no tokenizer {spec!r}; there are {', '.join(SPECS)}.{did_you_mean(spec, (*SPECS, 'integers'))}")


def fingerprint(tokenizer: Tokenizer) -> str:
    """16 hex digits that two tokenizers share if each id stands for the same in both, wherever their files lie."""
    if isinstance(tokenizer, JsonTokenizer):
        meanings: object = [tokenizer.byte_level, sorted(tokenizer.vocabulary.items())]
    else:
        name = "integers" if isinstance(tokenizer, IntegerTokenizer) else tokenizer.spec
        meanings = [name, tokenizer.vocab_size]
    return hashlib.sha256(json.dumps(meanings).encode()).hexdigest()[:16]


def learn_bpe(texts: Sequence[str], vocab_size: int) -> str:
    """Learn a byte-level BPE from `texts`; returns the content of its tokenizer.json. It encodes every text.

    Args:
        texts: the training text.
        vocab_size: number of ids, at least 257: the 256 bytes, the end of a document, and the merges.

    Raises:
        ConfigError: `vocab_size` is too small, or more than the text gives merges for.
    """
    if vocab_size < 257:
        raise ConfigError(f"tokenizer bpe:{vocab_size}: wanted at least 257 ids (256 bytes and the end of a document)")
    package = needed_package("tokenizers", "tokenizers", f"{LEARNED}{vocab_size}")
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[document_end.NAMES[0]],
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = tokenizer.get_vocab_size()
    if learned != vocab_size:
        raise ConfigError(f"tokenizer bpe:{vocab_size}: this text gives only {learned} ids; ask for bpe:{learned}")
    return tokenizer.to_str()


class ByteTokenizer:
    """UTF-8 bytes as ids. NUL is the end of document, so a text must not hold one."""

    spec = "bytes"
    vocab_size = 256
    eod: int | None = 0
    is_text = True
    byte_level = True

    def encode(self, text: str) -> list[int]:
        return list(self._encode(text))

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(self._encode(text), dtype=np.uint8)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        array = checked_ids(ids, self.spec, self.vocab_size)
        return array[array != self.eod].astype(np.uint8).tobytes()

    @staticmethod
    def _encode(text: str) -> bytes:
        data = utf8(text)
        if 0 in data:
            raise DataError(
                f"tokenizer bytes: NUL is the end of document and cannot stand inside a text; "
                f"one is at character {text.index(chr(0))}. Remove it, or use the tokenizer world"
            )
        return data


class IntegerTokenizer:
    """Whitespace-separated integers as ids, for music, DNA, algorithmic tasks: ``integers:V`` or ``integers:V:E``.

    The text form of ids is their numbers with one space between them.
    """

    is_text = False
    byte_level = False

    def __init__(self, spec: str) -> None:
        match = re.fullmatch(r"integers:([0-9]{1,10})(?::([0-9]{1,10}))?", spec)
        if match is None:
            raise ConfigError(f"tokenizer {spec!r}: wanted integers:V or integers:V:E, for instance integers:1000")
        self.spec = spec
        self.vocab_size = int(match[1])
        self.eod = None if match[2] is None else int(match[2])
        if not 1 <= self.vocab_size <= 2**31:
            raise ConfigError(f"tokenizer {spec!r}: wanted 1 <= V <= 2147483648, got {self.vocab_size}")
        if self.eod is not None and self.eod >= self.vocab_size:
            raise ConfigError(f"tokenizer {spec!r}: the end of document {self.eod} must be below V = {self.vocab_size}")

    def encode(self, text: str) -> list[int]:
        check_text(text)
        ids = []
        for position, word in enumerate(text.split(), start=1):
            if not (word.isascii() and word.isdigit() and len(word) <= 20 and int(word) < self.vocab_size):
                raise DataError(
                    f"tokenizer {self.spec}: wanted integers from 0 to {self.vocab_size - 1} between whitespace, "
                    f"got {word[:40]!r} as word {position}"
                )
            ids.append(int(word))
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=id_dtype(self.vocab_size))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return " ".join(map(str, listed_ids(ids, self.spec, self.vocab_size)))

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self.decode(ids).encode("ascii")


class TextStream:
    """Text from ids that come one by one, each character as soon as it is complete.

    The parts that `push` and the last `flush` return join to ``tokenizer.decode`` of all ids, less that of `before`.

    Args:
        before: ids that stand in front, such as a prompt's; their text is not given again. Those that stand for nothing
            are passed over.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._window: list[int] = []  # the last ids; of integers one, which decides that a space comes next
        self._shown = ""  # as much of their text as was given
        for token in before[-_WINDOW:]:
            with contextlib.suppress(DataError):
                tokenizer.decode_bytes([token])
                self.push(token)

    def push(self, token: int) -> str:
        """The characters that id `token` completes, possibly none. DataError for an id that stands for nothing."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._tokenizer.decode_bytes([token]))
        if not self._tokenizer.is_text:
            new = self._tokenizer.decode([token])
            space, self._window = " " if self._window else "", [token]
            return space + new
        # Here the text of an id depends on its neighbours (spaces, byte fallback): decode it behind the ids before it.
        text = self._tokenizer.decode([*self._window, token])
        self._window.append(token)
        certain = text.rstrip("\ufffd")  # what may still become a character
        new = certain[len(self._shown) :]
        self._shown += new
        if len(self._window) >= 2 * _WINDOW and self._shown == text:
            self._window = self._window[-_WINDOW:]
            self._shown = self._tokenizer.decode(self._window)
        return new

    def flush(self) -> str:
        """What is still held back, an incomplete character as U+FFFD; the stream starts anew."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        held = self._tokenizer.decode(self._window)[len(self._shown) :] if self._tokenizer.is_text else ""
        self._window, self._shown = [], ""
        return held


@functools.cache
def _world() -> WorldTokenizer:
    """The one World tokenizer of a process: it never changes, and reading its table takes a second."""
    return WorldTokenizer()
