"""Where one text goes on in another: both are encoded as a whole, and the ids are cut where the first one ends.

A tokenizer may write the same characters differently at the start of a text than inside it: those of the
SentencePiece family put a space in front, most take a word together with the space before it. The ids of two halves,
each encoded alone, are therefore not the ids of the text.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

from heron.errors import DataError
from heron.tokenizer import Tokenizer

_NEUTRAL = ("\n", "a")  # one of them stands apart from any text that follows


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of ``context + continuation``, cut where the context ends.

    The rule: both lists together are the ids of the whole text, and the context has the ids that lie in it from end to
    end. An id across the border, which stands for the last characters of the one and the first of the other, belongs
    to the continuation, so that what a model is asked about is always the text as it was trained on it. Where the
    context's own ids begin the whole's, as they nearly always do, this is the cut of lm-evaluation-harness (which
    drops the whole's first ids, as many as the context alone has). Inside a token that cut gives ids of another text,
    or no continuation; the one here is that of llama.cpp's multiple choice, which takes the ids that both have in
    common, and further ids whose text lies before the border ("\\n\\n" is one id at the end of a text and two before a
    word in the byte-level BPE of GPT-NeoX).

    Raises:
        DataError: a text that cannot be encoded.
    """
    whole, n, _ = _cut(tokenizer, context, continuation)
    return whole[:n], whole[n:]


def encode_behind(tokenizer: Tokenizer, before: Sequence[int], text: str) -> list[int]:
    """The ids of `text` where a model has read something already, or surely will: nothing of that can change.

    They are cut out of the ids of the whole, as in :func:`encode_pair`, with the text of `before` in front. Where an id
    would lie across the border, or nothing is known of what was read, they are the ids of the text inside a text, so
    without the space that begins one. Behind an end of document they are those of a text of its own.

    Args:
        before: the last ids that were read, as many as are known; none: something was read, and nobody knows what.

    Raises:
        DataError: a text that cannot be encoded.
    """
    ids = tokenizer.encode(text)
    if not tokenizer.is_text or not text or (len(before) and before[-1] == tokenizer.eod):
        return ids
    leads = _NEUTRAL
    with contextlib.suppress(DataError):  # ids that stand for nothing
        leads = (tokenizer.decode(before), *_NEUTRAL)
    for lead in leads:
        if lead:
            with contextlib.suppress(DataError):  # not every tokenizer knows the neutral ones
                whole, n, is_whole = _cut(tokenizer, lead, text)
                if is_whole:
                    return whole[n:]
    return ids


def encode_marked(tokenizer: Tokenizer, parts: Sequence[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """The ids of a text in parts, of which some are marked, and for each id whether it is of a marked part.

    The ids are those of the whole text. One that lies across a border is marked if either side is, as in
    :func:`encode_pair`, where it belongs to what a model is asked about.

    Raises:
        DataError: a text that cannot be encoded.
    """
    text = "".join(part for part, _ in parts)
    ids = tokenizer.encode(text)
    ends: list[int] = []  # of the ids; counted like `borders`
    if tokenizer.byte_level:
        n_bytes = {token: len(tokenizer.decode_bytes([token])) for token in set(ids)}
        ends = list(itertools.accumulate(n_bytes[token] for token in ids))
    if ends and ends[-1] == len(text.encode()):
        borders = list(itertools.accumulate(len(part.encode()) for part, _ in parts))
    else:  # ids that stand for another number of bytes: count ids, border by border
        ends = list(range(1, len(ids) + 1))
        at = itertools.accumulate(len(part) for part, _ in parts)
        cuts = [_cut(tokenizer, text[:border], text[border:]) if border < len(text) else None for border in at]
        borders = [len(ids) if cut is None else cut[1] + (0 if cut[2] else 0.5) for cut in cuts]
    marks, number, begin = [], 0, 0
    for end in ends:
        while number < len(borders) - 1 and borders[number] <= begin:
            number += 1
        last = number
        while last < len(borders) - 1 and borders[last] < end:
            last += 1
        marks.append(any(marked for _, marked in parts[number : last + 1]))
        begin = end
    return ids, marks


def _cut(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int, bool]:
    """The ids of the whole, how many of them are the context's, and whether the context ends where an id ends."""
    alone, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    same = (mine == theirs for mine, theirs in zip(alone, whole, strict=False))
    n = sum(1 for _ in itertools.takewhile(bool, same))
    if n == len(alone):
        return whole, n, True
    text = tokenizer.decode(whole)
    if not text.endswith(continuation):  # a tokenizer that changes the text, to lower case for instance
        return whole, n, False
    before = text.removesuffix(continuation)
    is_whole = False
    for end in range(n + 1, len(whole)):
        part = tokenizer.decode(whole[:end])
        if before.startswith(part):
            n, is_whole = end, part == before
        elif len(part) > len(before):
            break
    return whole, n, is_whole
