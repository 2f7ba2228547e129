"""JSON as RFC 8259 means it, of bounded depth: what other readers would understand in another way is refused.

Rows of a data set are read by :func:`lenient`, for they carry fields that nobody asks for; :func:`doubled` names the
keys of a row that cannot be trusted.
"""

from __future__ import annotations

import collections
import json
import math
import re
from typing import Any, NoReturn

DEEPEST = 64
DEEPEST_LENIENT = 500  # well below Python's own limit

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def loads(data: bytes) -> Any:
    """The value in `data`, UTF-8 without a byte order mark.

    Raises:
        ValueError: bytes that are not UTF-8 or not JSON, more than DEEPEST levels, a key that comes twice in an
            object, a number that is not finite as a float.
    """
    return _loads(data, _DECODER, DEEPEST)


def lenient(data: bytes) -> Any:
    """The value in `data` as Python's and pandas' writers spell it, up to DEEPEST_LENIENT levels.

    NaN, Infinity and any number are read. Of a key that comes twice the last value is kept: see :func:`doubled`.

    Raises:
        ValueError: bytes that are not UTF-8 or not JSON, more levels.
    """
    return _loads(data, _LENIENT, DEEPEST_LENIENT)


def lenient_at(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at character `start`, read by :func:`lenient`, and its end; ValueError likewise."""
    try:
        value, end = _LENIENT.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"not JSON: nested more than {DEEPEST_LENIENT} deep") from None
    if text.count("[", start, end) + text.count("{", start, end) > DEEPEST_LENIENT:
        _check_depth(text[start:end].encode("utf-8", "surrogatepass"), DEEPEST_LENIENT)
    return value, end


def doubled(row: dict[str, Any]) -> frozenset[str]:
    """The keys that came more than once in an object that :func:`lenient` has read."""
    return getattr(row, "twice", frozenset())


def _loads(data: bytes, decoder: json.JSONDecoder, deepest: int) -> Any:
    if data.count(b"[") + data.count(b"{") > deepest:
        _check_depth(data, deepest)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}: {error.reason}"
        ) from None
    if text.startswith("\ufeff"):
        raise ValueError("not JSON: it begins with a byte order mark; save it as UTF-8 without one")
    try:
        return decoder.decode(text)
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:  # called from deep inside another program
        raise ValueError("not JSON: nested too deep") from None


class _RefusedError(ValueError):
    """JSON by its grammar, but not one that all readers take for the same."""


class _Doubled(dict):
    """An object some of whose keys, `twice`, came more than once."""

    twice: frozenset[str]


def _check_depth(data: bytes, deepest: int) -> None:
    """ValueError where brackets outside of strings nest more than so deep."""
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub(b"", data)):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > deepest:
            raise ValueError(f"not JSON: nested more than {deepest} deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in keys if names.count(name) > 1)
        raise _RefusedError(f"the key {twice[:80]!r} comes twice")
    return keys


def _last_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) == len(pairs):
        return keys
    counts = collections.Counter(name for name, _ in pairs)
    keys = _Doubled(keys)
    keys.twice = frozenset(name for name, count in counts.items() if count > 1)
    return keys


def _any_integer(text: str) -> int | float:
    """An integer, or what a float makes of one that has more digits than Python converts."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _RefusedError(f"the number {text[:40]} is beyond what a float holds")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse_constant)
_LENIENT = json.JSONDecoder(object_pairs_hook=_last_of_each, parse_int=_any_integer)
