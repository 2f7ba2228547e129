"""Answers in a form that is asked for: JSON, JSON by a schema, a function call, each by a grammar over bytes."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
import torch
from torch import Tensor

from heron.errors import HeronError
from heron.serve.refusals import Refusal
from heron.serve.wire import bytes_of
from heron.tokenizer import Tokenizer

MOST_SCHEMA_BYTES = 1 << 16
# Nothing, one space, or a line break and its indentation: a model may not go on with spaces for ever.
_BETWEEN = {"whitespace_pattern": r"(\n[ ]{0,40}|[ ])?"}
_LIMITS = llguidance.LLParserLimits(verbose_errors=False)  # else as the package has them
CALL_OPENING, CALL_CLOSING = "**Tool Call:**\n```json\n", "\n```"  # of heron.data.template


class Grammar:
    """A constraint (:class:`heron.generation.constraint.Constraint`) by a grammar in llguidance's form of Lark."""

    def __init__(self, matcher: llguidance.LLMatcher, n_ids: int):
        self._matcher, self._n_ids = matcher, n_ids

    @property
    def is_over(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether it must end here, as nothing may follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=self._n_ids, bitorder="little").astype(bool))

    def accept(self, token: int) -> None:
        """Move on by a token. HeronError where the grammar has become too complex to follow."""
        if not self._matcher.consume_token(token):
            raise HeronError(f"response_format: {self._matcher.get_error()[:200]}")


class Grammars:
    """Makes grammars over the ids of a tokenizer.

    Args:
        tokenizer: its ids must be bytes, one behind another.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def of_json(self, schema: Mapping[str, Any] | None, param: str, opened: str = "") -> Grammar:
        """An answer that is JSON and follows `schema`; None: any object.

        Args:
            param: where the schema comes from, for errors.
            opened: what the prompt has opened the answer with, a thought perhaps.

        Raises:
            Refusal: a schema that no grammar can be made of, or a tokenizer whose ids are no bytes.
        """
        return self._made(f"{_start(opened)} answer\nanswer: {_json(schema, param)}", param)

    def of_call(self, tools: Sequence[Mapping[str, Any]], opened: str = "") -> Grammar:
        """An answer that calls one of `tools`. Errors as in :meth:`of_json`."""
        calls = {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"name": {"const": tool["name"]}, "arguments": tool.get("parameters") or _ANY_OBJECT},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
                for tool in tools
            ]
        }
        rule = f"{json.dumps(CALL_OPENING)} call {json.dumps(CALL_CLOSING)}"
        return self._made(f"{_start(opened)} {rule}\ncall: {_json(calls, 'tools')}", "tools")

    def _made(self, rules: str, param: str) -> Grammar:
        matcher = llguidance.LLMatcher(self._ids, rules, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            reason = matcher.get_error().partition("\n")[0].partition(": ")[2]
            raise Refusal(400, f"{param}: {reason[:300] or 'no grammar can be made of it'}", param)
        grammar = Grammar(matcher, self._tokenizer.vocab_size)
        if not grammar.allowed().any() or matcher.is_error():  # such as a schema that refers to itself alone
            raise Refusal(400, f"{param}: no text follows it", param)
        return grammar

    @functools.cached_property
    def _ids(self) -> llguidance.LLTokenizer:
        if not (self._tokenizer.is_text and self._tokenizer.byte_level):
            raise Refusal(400, "response_format: the tokenizer of this model has ids that are no bytes of text")
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes(self._tokenizer)))


class _Bytes:
    """A tokenizer as llguidance asks for one: the bytes of each id."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer):
        self._encode, eod = tokenizer.encode, tokenizer.eod
        self.tokens = [bytes_of(tokenizer, [token]) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = [token for token, text in enumerate(self.tokens) if not text]
        if eod is None:  # an id that the model does not have; Grammar.is_complete ends the text
            eod = len(self.tokens)
            self.tokens.append(b"<end>")
            self.special_token_ids.append(eod)
        self.eos_token_id = eod

    def __call__(self, text: str) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("wanted a str")  # so that llguidance gives one
        return self._encode(text)


_ANY_OBJECT = {"type": "object"}


def _json(schema: Mapping[str, Any] | None, param: str) -> str:
    text = json.dumps({**(_ANY_OBJECT if schema is None else schema), "x-guidance": _BETWEEN})
    if len(text) > MOST_SCHEMA_BYTES:
        raise Refusal(400, f"{param}: wanted a schema of at most {MOST_SCHEMA_BYTES} bytes, got {len(text)}", param)
    return f"%json {text}"


def _start(opened: str) -> str:
    """The rules up to an answer that was opened so: a space, or the rest of a thought."""
    if opened.endswith("</think"):
        return 'start: ">" /[ \\n]{0,2}/'
    if opened.endswith("<think"):
        return 'thought[suffix="</think>"]: /(?s:.*)/\nstart: ">" thought /[ \\n]{0,2}/'
    return 'start: " "?'
