"""A `tokenizer.json` as a tokenizer, through the package of Hugging Face."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from heron.errors import DataError
from heron.tokenizer import document_end
from heron.tokenizer.byte_fallback import byte_tokens, mended
from heron.tokenizer.checks import id_dtype, listed_ids, needed_package, utf8


class JsonTokenizer:
    """A `tokenizer.json` of Hugging Face tokenizers, such as GPT-NeoX's.

    `vocab_size` is the highest id plus 1. Nothing is added, truncated or padded, whatever the file asks for.

    Attributes:
        end: how the end of a document was found (:func:`heron.tokenizer.document_end.find`).
    """

    is_text = True

    def __init__(self, path: str, eod: str | None = None) -> None:
        self.spec = path
        package = needed_package("tokenizers", "tokenizers", path)
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
        utf8(text)
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

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Every token, as the file spells it, and its id."""
        return self._id_of

    def normalized(self, text: str) -> str:
        """The form of `text`, NFC or lower case for instance, that the file's normalizer makes before it is encoded."""
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _known(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        known = listed_ids(ids, self.spec, self.vocab_size)
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
            byte_of = byte_alphabet()
            for token, index in self._id_of.items():
                if index not in added and all(character in byte_of for character in token):
                    spelled[index] = bytes(byte_of[character] for character in token)
        if self.eod is not None:
            spelled[self.eod] = b""
        return spelled


def byte_alphabet() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(byte): byte for byte in themselves} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
