"""JSON as RFC 8259 means it, of bounded depth: what other readers would understand in another way is refused."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

DEEPEST = 64

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def loads(data: bytes) -> Any:
    """The value in `data`, UTF-8 without a byte order mark.

    Raises:
        ValueError: bytes that are not UTF-8 or not JSON, more than DEEPEST levels, a key that comes twice in an
            object, a number that is not finite as a float.
    """
    if data.count(b"[") + data.count(b"{") > DEEPEST and _depth(data) > DEEPEST:
        raise ValueError(f"not JSON: nested more than {DEEPEST} deep")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}: {error.reason}"
        ) from None
    if text.startswith("\ufeff"):
        raise ValueError("not JSON: it begins with a byte order mark; save it as UTF-8 without one")
    try:
        return _DECODER.decode(text)
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"not JSON: {error}") from None


class _RefusedError(ValueError):
    """JSON by its grammar, but not one that all readers take for the same."""


def _depth(data: bytes) -> int:
    """The deepest nesting outside of strings, or one beyond DEEPEST when it is more."""
    depth = deepest = 0
    for bracket in _BRACKET.finditer(_STRING.sub(b"", data)):
        depth += 1 if bracket[0] in b"[{" else -1
        deepest = max(deepest, depth)
        if deepest > DEEPEST:
            break
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in keys if names.count(name) > 1)
        raise _RefusedError(f"the key {twice[:80]!r} comes twice")
    return keys


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _RefusedError(f"the number {text[:40]} is beyond what a float holds")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse_constant)
