"""RWKV World: the table of tokens, and the greedy longest match over bytes."""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heron.errors import DataError
from heron.tokenizer.checks import id_dtype, listed_ids, needed_package, utf8

WORLD_FILE = "rwkv_vocab_v20230424.txt"


def world_file() -> Path:
    """The table as upstream publishes it: lines of an id, a literal and a length in bytes.

    Raises:
        ConfigError: pyrwkv-tokenizer, which holds it, is not installed.
    """
    return Path(_package().__file__).with_name(WORLD_FILE)


def _package() -> Any:
    return needed_package("pyrwkv_tokenizer", "pyrwkv-tokenizer", WorldTokenizer.spec)


class WorldTokenizer:
    """The RWKV World vocabulary: greedy longest match over bytes. Needs pyrwkv-tokenizer, which holds the table.

    Ids 1..65529 are the table, 0 is the end of document, and 65530..65535 fill the models' 65,536 rows and stand for
    nothing. pyrwkv-tokenizer encodes text; ids are decoded here, since it does not for split characters.
    """

    spec = "world"
    vocab_size = 65536
    eod: int | None = 0
    is_text = True
    byte_level = True

    def __init__(self) -> None:
        self._package = _package()

    def encode(self, text: str) -> list[int]:
        utf8(text)
        return self._encoder.encode(text)

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=id_dtype(self.vocab_size))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        table = self._bytes_of
        return b"".join([table[i] for i in listed_ids(ids, self.spec, len(table))])

    @property
    def table(self) -> list[bytes]:
        """The bytes of ids 0 to 65529; id 0 stands for none."""
        return self._bytes_of

    @functools.cached_property
    def _encoder(self) -> Any:
        return self._package.RWKVTokenizer()

    @functools.cached_property
    def _bytes_of(self) -> list[bytes]:
        """Bytes of ids 0..65529."""
        path, table = world_file(), [b""]
        try:
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    index, _, rest = line.partition(" ")
                    literal, _, length = rest.rpartition(" ")
                    token = _value(literal)
                    if int(index) != len(table) or int(length) != len(token):
                        raise ValueError(f"id {index} with {len(token)} bytes, wanted {len(table)} with {int(length)}")
                    table.append(token)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"{path}, line {len(table)}: not the World vocabulary: {error}. "
                "Type: pip install --force-reinstall pyrwkv-tokenizer"
            ) from None
        return table


def _value(literal: str) -> bytes:
    """The bytes that a literal of Python stands for. Most are plain text between quotes, which is read at once."""
    text, quote = literal[1:-1], literal[:1]
    if quote in ("'", '"') and literal[1:].endswith(quote) and quote not in text and "\\" not in text:
        return text.encode("utf-8")
    value = ast.literal_eval(literal)
    return value.encode("utf-8") if isinstance(value, str) else value
