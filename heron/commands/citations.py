"""What a text recalled, for `heron generate --show_memory`: underlined in a terminal, and where it comes from."""

from __future__ import annotations

import dataclasses

from heron.data.token_index import DocumentIndex
from heron.generation import Token
from heron.generation.chat import printable

LEAST = 4  # tokens of a match; shorter ones are found anywhere
_MOST = 12  # passages that are listed
_UNDERLINED, _PLAIN = "\x1b[4m", "\x1b[24m"
_WIDTH, _OF_TEXT = 79, 30  # columns of a line, and of the text in it


@dataclasses.dataclass
class _Passage:
    """Tokens that were drawn one after another as they stand somewhere else."""

    text: str
    n_tokens: int
    back: int | None  # how many tokens before it the sequence has it; None: it stands in a document
    position: int | None  # of its first token in the index of documents


class Citations:
    """Of one text. A token was recalled if the longest match, of at least 4 tokens, predicted it.

    Args:
        documents: those that the model looked into.
        in_terminal: whether the text is shown in a terminal, which can underline and has 80 columns.
    """

    def __init__(self, documents: DocumentIndex | None, in_terminal: bool):
        self._documents, self._in_terminal = documents, in_terminal
        self._passages: list[_Passage] = []
        self._goes_on = False  # whether the last token was recalled

    def add(self, token: Token | None, text: str) -> str:
        """Note the next token, and the text that became certain with it; that text as it is to be shown."""
        match = None if token is None else token.match
        if match is None or match.length < LEAST:
            self._goes_on = False
            return text
        last = self._passages[-1] if self._goes_on else None
        after_last = None if last is None or last.position is None else last.position + last.n_tokens
        if last is not None and (last.back, after_last) == (match.back, match.position):
            last.text, last.n_tokens = last.text + text, last.n_tokens + 1
        else:
            self._passages.append(_Passage(text, 1, match.back, match.position))
        self._goes_on = True
        return f"{_UNDERLINED}{text}{_PLAIN}" if self._in_terminal and text else text

    def sources(self) -> list[str]:
        """Lines that say where the text was recalled from, the longest passages, in their order."""
        if not self._passages:
            return [f"nothing was recalled (no match of {LEAST} tokens or more)"]
        longest = sorted(self._passages, key=lambda passage: -passage.n_tokens)[:_MOST]
        lines = [self._line(passage) for passage in self._passages if any(passage is one for one in longest)]
        rest = len(self._passages) - len(lines)
        return ["recalled:", *lines, *([f"  and {rest} shorter or later ones"] if rest else [])]

    def _line(self, passage: _Passage) -> str:
        text = printable(" ".join(passage.text.split()))
        text = text if len(text) <= _OF_TEXT else f"{text[: _OF_TEXT - 1]}…"
        what = f"  {text:<{_OF_TEXT}}  {passage.n_tokens:>4} {'token' if passage.n_tokens == 1 else 'tokens':<6}  "
        if passage.back is not None:
            return f"{what}{passage.back:,} tokens back"
        if self._documents is None or passage.position is None:
            return f"{what}documents"
        name, place = self._documents.document_of(passage.position)
        name, where = printable(name), f", token {place:,}"
        room = _WIDTH - len(what) - len(where)
        if self._in_terminal and len(name) > room:
            name = f"…{name[1 - room :]}"
        return f"{what}{name}{where}"
