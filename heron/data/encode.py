"""One document to ids, with every check."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import numpy as np

from heron import tokenizer as tokenizers
from heron.errors import DataError
from heron.tokenizer import JsonTokenizer, Tokenizer


def encode_document(
    tokenizer: Tokenizer,
    where: str,
    text: str,
    vocab_size: int,
    allow_normalized: bool = False,
    on_normalized: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """The ids of one document, checked, its end of document appended where `tokenizer` has one.

    Args:
        allow_normalized: let a text through that decoding gives back in another form, if both are one text to the
            tokenizer's own normalizer (NFC, NFKC, lower case, accents, control characters), but for a space in front.
            An unknown word, or spaces that get lost, are refused in any case.
        on_normalized: called for a text that was let through so.

    Returns:
        1-D integers; none at all for a document without text.

    Raises:
        DataError: naming `where`: text that cannot be encoded or is not given back by decoding, an end of document
            inside it, or an id that is not below `vocab_size`.
    """
    try:
        ids = tokenizer.encode_array(text)
        back = tokenizer.decode(ids) if tokenizer.is_text else text
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if tokenizer.eod is not None and (ids == tokenizer.eod).any():
        position = int((ids == tokenizer.eod).argmax())
        mark = tokenizer.end.token if isinstance(tokenizer, JsonTokenizer) else None
        hint = f"; --split_at '{mark}' ends a document there" if mark and mark in text else ""
        raise DataError(
            f"{where}: the end of document, id {tokenizer.eod}, stands inside the text (token {position}){hint}"
        )
    if back != text:
        same = _normal_form(tokenizer, back) == _normal_form(tokenizer, text)
        if not (same and allow_normalized):
            at = len(os.path.commonprefix([back, text]))
            shown = ascii if same else repr  # two forms of one text may look the same
            hint = "--allow_normalized lets texts through that it only normalizes, and counts them; or " if same else ""
            raise DataError(
                f"{where}: tokenizer {tokenizer.spec} does not give the text back: from character {at} on, wanted "
                f"{shown(text[at : at + 20])}, got {shown(back[at : at + 20])}; {hint}use one without loss, say world"
            )
        on_normalized()
    if tokenizer.eod is not None and len(ids):
        ids = np.append(ids, np.array(tokenizer.eod, dtype=ids.dtype))
    if ids.max(initial=0) >= vocab_size:
        position = int((ids >= vocab_size).argmax())
        raise DataError(
            f"{where}: id {ids[position]} (token {position}) is outside the vocabulary of {vocab_size}; "
            f"tokenizer {tokenizer.spec} has ids below {tokenizer.vocab_size}"
        )
    return ids


def _normal_form(tokenizer: Tokenizer, text: str) -> str:
    """What the tokenizer's normalizer, if it has one, makes of `text`, without a space in front."""
    return getattr(tokenizer, "normalized", str)(text).removeprefix(" ")


def warn_of_no_end(tokenizer: Tokenizer) -> None:
    """Say that documents run together under a tokenizer without an end of document."""
    if isinstance(tokenizer, tokenizers.IntegerTokenizer):
        what = f"{tokenizer.spec}:E names id E as the end of document"
    else:
        reason = f" ({tokenizer.end.reason})" if isinstance(tokenizer, JsonTokenizer) else ""
        what = f"--eod names the end of document{reason}"
    warnings.warn(f"tokenizer {tokenizer.spec}: no id ends a document, so that they run together; {what}", stacklevel=3)
