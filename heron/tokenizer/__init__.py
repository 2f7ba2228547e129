"""Text to token ids and back: World, bytes, integers and `tokenizer.json` files, behind one small protocol."""

from __future__ import annotations

import ast
import codecs
import contextlib
import functools
import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from heron.errors import ConfigError, DataError, did_you_mean
from heron.tokenizer import document_end
from heron.tokenizer.byte_fallback import byte_tokens, mended

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

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as a 1-D integer array of a dtype just wide enough; it may be read-only."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, invalid UTF-8 replaced by U+FFFD. DataError for an id that stands for nothing."""

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The UTF-8 bytes of `ids`; they may begin or end inside a character. DataError as in `decode`."""


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
    if spec.startswith(LEARNED):
        raise ConfigError(f"tokenizer {spec}: only heron train learns it; name the tokenizer.json of the run instead")
    raise ConfigError(f"no tokenizer {spec!r}; there are {', '.join(SPECS)}.{did_you_mean(spec, (*SPECS, 'integers'))}")


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
    package = _package("tokenizers", "tokenizers", f"{LEARNED}{vocab_size}")
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


def id_dtype(vocab_size: int) -> type[np.integer]:
    """The dtype that ids below `vocab_size` are kept in: uint16 where they fit, else int32."""
    return np.uint16 if vocab_size <= 65536 else np.int32


class ByteTokenizer:
    """UTF-8 bytes as ids. NUL is the end of document, so a text must not hold one."""

    spec = "bytes"
    vocab_size = 256
    eod = 0
    is_text = True
    byte_level = True

    def encode(self, text: str) -> list[int]:
        return list(self._encode(text))

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(self._encode(text), dtype=np.uint8)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        array = _checked_ids(ids, self.spec, self.vocab_size)
        return array[array != self.eod].astype(np.uint8).tobytes()

    @staticmethod
    def _encode(text: str) -> bytes:
        data = _utf8(text)
        if 0 in data:
            raise DataError(
                f"tokenizer bytes: NUL is the end of document and cannot stand inside a text; "
                f"one is at character {text.index(chr(0))}. Remove it, or use the tokenizer world"
            )
        return data


class WorldTokenizer:
    """The RWKV World vocabulary: greedy longest match over bytes. Needs pyrwkv-tokenizer, which holds the table.

    Ids 1..65529 are the table, 0 is the end of document, and 65530..65535 fill the models' 65,536 rows and stand for
    nothing. pyrwkv-tokenizer encodes text; bytes are encoded and ids decoded here, since it does neither for split
    characters.
    """

    spec = "world"
    vocab_size = 65536
    eod = 0
    is_text = True
    byte_level = True

    def __init__(self) -> None:
        self._package = _package("pyrwkv_tokenizer", "pyrwkv-tokenizer", self.spec)

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        return self._encoder.encode(text)

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=id_dtype(self.vocab_size))

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes, valid UTF-8 or not; equal to `encode` where they are."""
        ids_of, lengths_after = self._longest_match
        ids: list[int] = []
        start = 0
        while start < len(data):
            for length in lengths_after.get(data[start : start + 2], (1,)):
                candidate = data[start : start + length]
                if candidate in ids_of:
                    ids.append(ids_of[candidate])
                    start += len(candidate)
                    break
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        table = self._bytes_of
        return b"".join([table[i] for i in _checked_ids(ids, self.spec, len(table)).tolist()])

    @property
    def table(self) -> list[bytes]:
        """The bytes of ids 0 to 65529; id 0 stands for none."""
        return self._bytes_of

    @functools.cached_property
    def _encoder(self) -> Any:
        return self._package.RWKVTokenizer()

    @functools.cached_property
    def _bytes_of(self) -> list[bytes]:
        """Bytes of ids 0..65529, from lines of the form ``id literal length``."""
        path = Path(self._package.__file__).with_name("rwkv_vocab_v20230424.txt")
        table = [b""]
        try:
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    index, _, rest = line.partition(" ")
                    literal, _, length = rest.rpartition(" ")
                    token = ast.literal_eval(literal)
                    token = token.encode("utf-8") if isinstance(token, str) else token
                    if int(index) != len(table) or int(length) != len(token):
                        raise ValueError(f"id {index} with {len(token)} bytes, wanted {len(table)} with {int(length)}")
                    table.append(token)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"{path}, line {len(table)}: not the World vocabulary: {error}. "
                "Type: pip install --force-reinstall pyrwkv-tokenizer"
            ) from None
        return table

    @functools.cached_property
    def _longest_match(self) -> tuple[dict[bytes, int], dict[bytes, list[int]]]:
        """Ids by bytes, and by its first two bytes the lengths that a token may have, longest first, down to 1."""
        ids_of = {token: index for index, token in enumerate(self._bytes_of) if token}
        lengths: dict[bytes, set[int]] = {}
        for token in ids_of:
            if len(token) > 1:
                lengths.setdefault(token[:2], {1}).add(len(token))
        return ids_of, {head: sorted(found, reverse=True) for head, found in lengths.items()}


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
        _check_text(text)
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
        return " ".join(map(str, _checked_ids(ids, self.spec, self.vocab_size).tolist()))

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self.decode(ids).encode("ascii")


class JsonTokenizer:
    """A `tokenizer.json` of Hugging Face tokenizers, such as GPT-NeoX's.

    `vocab_size` is the highest id plus 1. Nothing is added, truncated or padded, whatever the file asks for.

    Attributes:
        end: how the end of a document was found (:func:`heron.tokenizer.document_end.find`).
    """

    is_text = True

    def __init__(self, path: str, eod: str | None = None) -> None:
        self.spec = path
        package = _package("tokenizers", "tokenizers", path)
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{path}: cannot be read as a tokenizer.json: {reason}") from None
        try:
            self._tokenizer = package.Tokenizer.from_str(text)
        except Exception as error:  # the class that tokenizers raises, for every fault of a file
            raise DataError(f"{path}: not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._id_of = self._tokenizer.get_vocab(with_added_tokens=True)
        if not self._id_of:
            raise DataError(f"{path}: its vocabulary is empty")
        self.vocab_size = max(self._id_of.values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: index for index, token in sorted(added.items()) if token.special}
        self.end = document_end.find(Path(path), self._id_of, special, eod)
        self.eod = self.end.id
        self.byte_level = isinstance(self._tokenizer.decoder, package.decoders.ByteLevel)

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        # Unlike `encode`, this lets other threads run meanwhile, and it finds no positions, which nobody asks for.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=id_dtype(self.vocab_size))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        if self.byte_level:
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        known = [i for i in self._known(ids) if i != self.eod]
        if not self._byte_tokens.keys().isdisjoint(known):
            tokens = mended(known, [self._tokenizer.id_to_token(i) for i in known], self._byte_tokens)
            if tokens is not None:
                return self._tokenizer.decoder.decode(tokens)
        return self._tokenizer.decode(known, skip_special_tokens=False)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        if not self.byte_level:
            return self.decode(ids).encode("utf-8")
        table = self._bytes_of
        return b"".join([table[i] for i in self._known(ids)])

    def normalized(self, text: str) -> str:
        """The form of `text`, NFC or lower case for instance, that the file's normalizer makes before it is encoded."""
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _known(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        known = _checked_ids(ids, self.spec, self.vocab_size).tolist()
        table = self._bytes_of
        for position, token in enumerate(known):
            if token not in table:
                raise DataError(f"tokenizer {self.spec}: id {token} at position {position} is a gap in its vocabulary")
        return known

    @functools.cached_property
    def _byte_tokens(self) -> dict[int, int]:
        return byte_tokens(self._tokenizer.decoder, self._id_of)

    @functools.cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        """Bytes of every id; those of a byte-level file are spelled with one printable character a byte."""
        spelled = {index: token.encode("utf-8") for token, index in self._id_of.items()}
        if self.byte_level:
            added = self._tokenizer.get_added_tokens_decoder()
            byte_of = _byte_alphabet()
            for token, index in self._id_of.items():
                if index not in added and all(character in byte_of for character in token):
                    spelled[index] = bytes(byte_of[character] for character in token)
        if self.eod is not None:
            spelled[self.eod] = b""
        return spelled


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
        self._window: list[int] = []  # the last ids
        self._shown = ""  # as much of their text as was given
        for token in before[-_WINDOW:]:
            with contextlib.suppress(DataError):
                tokenizer.decode_bytes([token])
                self.push(token)

    def push(self, token: int) -> str:
        """The characters that id `token` completes, possibly none. DataError for an id that stands for nothing."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._tokenizer.decode_bytes([token]))
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
        new = self._tokenizer.decode(self._window)[len(self._shown) :]
        self._window, self._shown = [], ""
        return new


@functools.cache
def _world() -> WorldTokenizer:
    """The one World tokenizer of a process: it never changes, and reading its table takes a second."""
    return WorldTokenizer()


def _checked_ids(ids: Sequence[int] | np.ndarray, spec: str, limit: int) -> np.ndarray:
    """`ids` as a 1-D integer array; DataError unless all are in [0, limit)."""
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"tokenizer {spec}: wanted a flat sequence of integer ids, got {array.dtype} {array.shape}")
    if array.min() < 0 or array.max() >= limit:
        position = int(((array < 0) | (array >= limit)).argmax())
        raise DataError(
            f"tokenizer {spec}: id {array[position]} at position {position} stands for nothing; wanted 0 to {limit - 1}"
        )
    return array


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise DataError(f"wanted a text, a str, got {type(text).__name__}")


def _utf8(text: str) -> bytes:
    _check_text(text)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half a surrogate pair, {ascii(text[error.start])}, at character {error.start}; "
            "UTF-8 has no such character"
        ) from None


def _byte_alphabet() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(byte): byte for byte in themselves} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _package(module: str, distribution: str, spec: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"tokenizer {spec!r} needs {distribution} ({error}). Type: pip install {distribution}"
        ) from None
