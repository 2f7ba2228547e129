"""What the tokenizers share: checks of texts and ids, the dtype of ids, packages that may be missing."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from heron.errors import ConfigError, DataError

_FEW = 32  # ids


def id_dtype(vocab_size: int) -> type[np.integer]:
    """The dtype that ids below `vocab_size` are kept in: uint16 where they fit, else int32."""
    return np.uint16 if vocab_size <= 65536 else np.int32


def checked_ids(ids: Sequence[int] | np.ndarray, spec: str, limit: int) -> np.ndarray:
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


def listed_ids(ids: Sequence[int] | np.ndarray, spec: str, limit: int) -> list[int]:
    """As :func:`checked_ids`, as a list; a few are checked faster here than by NumPy."""
    if type(ids) is list and len(ids) <= _FEW and all(type(i) is int and 0 <= i < limit for i in ids):
        return ids
    return checked_ids(ids, spec, limit).tolist()


def check_text(text: object) -> None:
    """DataError unless it is a str."""
    if not isinstance(text, str):
        raise DataError(f"wanted a text, a str, got {type(text).__name__}")


def utf8(text: str) -> bytes:
    """`text` in UTF-8; DataError, with the position, for half a surrogate pair, and for what is no str."""
    check_text(text)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half a surrogate pair, {ascii(text[error.start])}, at character {error.start}; "
            "UTF-8 has no such character"
        ) from None


def needed_package(module: str, distribution: str, spec: str) -> Any:
    """The module of a package that the tokenizer `spec` needs; ConfigError, with what to type, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"tokenizer {spec!r} needs {distribution} ({error}). Type: pip install {distribution}"
        ) from None
