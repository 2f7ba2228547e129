"""How results look on the wire: ids, token lists, server-sent events."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from heron.errors import DataError
from heron.generation import Token
from heron.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
FINISH = {"end": "stop", "stop": "stop", "length": "length"}  # the engine's words, and OpenAI's

__all__ = ["DONE", "FINISH", "bytes_of", "event", "new_id", "quoted", "scored", "usage"]


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def event(value: Any, name: str | None = None) -> bytes:
    """A server-sent event of JSON."""
    line = f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
    return (line if name is None else f"event: {name}\n{line}").encode()


def usage(n_prompt: int, n_drawn: int, n_cached: int = 0) -> dict[str, Any]:
    """Counts of tokens; those that the prefix cache had read are among the prompt's."""
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_drawn,
        "total_tokens": n_prompt + n_drawn,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }


def scored(tokens: Iterable[Token], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Drawn tokens with their log-probabilities, as chat completions list them; without those that end the text."""
    found = []
    for token in tokens:
        if token.id != tokenizer.eod:
            top = [_scored(tokenizer, other, logprob) for other, logprob in token.top]
            found.append({**_scored(tokenizer, token.id, token.logprob), "top_logprobs": top})
    return found


def _scored(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = bytes_of(tokenizer, [token])
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}


def bytes_of(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    """The bytes of ids; none where one of them stands for nothing."""
    try:
        return tokenizer.decode_bytes(ids)
    except DataError:
        return b""
