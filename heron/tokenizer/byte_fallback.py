"""Tokens for single bytes, ``<0x00>`` to ``<0xFF>``, which tokenizers of the Llama family write unknown text with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def byte_tokens(decoder: Any, id_of: Mapping[str, int]) -> dict[int, int]:
    """Bytes by the ids that a decoder of the tokenizers package takes for bytes; empty without byte fallback."""
    if decoder is None or decoder.decode(["<0x41>"]) != "A":
        return {}
    names = {f"<0x{byte:02X}>": byte for byte in range(256)}
    return {id_of[name]: byte for name, byte in names.items() if name in id_of}


def mended(ids: Sequence[int], tokens: Sequence[str], byte_of: Mapping[int, int]) -> list[str] | None:
    """`tokens` with one U+FFFD for each piece of bytes that is no character; None: every byte belongs to one.

    The decoder itself replaces every byte of a run that is not valid as a whole, its characters too, so that no
    character of a run would be certain before the run ends.

    Args:
        ids, tokens: the same, as numbers and as they are spelled.
        byte_of: see :func:`byte_tokens`.
    """
    result: list[str] = []
    is_broken = False
    for is_byte, run in itertools.groupby(zip(ids, tokens, strict=True), lambda pair: pair[0] in byte_of):
        numbers, spelled = zip(*run, strict=True)
        data = bytes(byte_of[i] for i in numbers) if is_byte else b""
        while data:
            try:
                data.decode("utf-8")
                break
            except UnicodeDecodeError as error:
                result += [*spelled[: error.start], "\ufffd"]
                data, spelled, is_broken = data[error.end :], spelled[error.end :], True
        result += spelled
    return result if is_broken else None
