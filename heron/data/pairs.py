"""Pairs of answers to one prompt, of which one was chosen: each becomes two samples, one behind the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from heron.data.conversations import Encoded, encoded, row_of
from heron.data.template import Template
from heron.tokenizer import Tokenizer

ANSWERS = ("chosen", "rejected")


def encode_pair(
    fields: Mapping[str, Any], tokenizer: Tokenizer, ctx_len: int, chat_template: Template, loss: str
) -> Encoded:
    """The two samples of a row with `prompt`, `chosen` and `rejected`: texts, or lists of messages as OpenAI has them.

    Of both only the answer counts, up to the end of its turn. A pair whose two samples do not fit `ctx_len` together is
    left out: it can't be cut.

    Raises:
        ValueError: another form, with the field.
    """
    if missing := [name for name in ("prompt", *ANSWERS) if name not in fields]:
        raise ValueError(f"wanted prompt, chosen and rejected; {missing[0]} is missing")
    if fields["chosen"] == fields["rejected"]:
        raise ValueError("rejected: is the same as chosen")
    prompt, samples = fields["prompt"], []
    for name in ANSWERS:
        if isinstance(prompt, list) != isinstance(fields[name], list):
            raise ValueError(f"{name}: wanted what prompt is, a text or a list of messages")
        try:
            row = row_of({"prompt": prompt, "completion": fields[name], "tools": fields.get("tools")})
        except ValueError as error:
            raise ValueError(f"prompt and {name}: {error}") from None
        if row.messages:
            before = [dataclasses.replace(message, learned=False) for message in row.messages[: len(prompt)]]
            row = row._replace(messages=(*before, *row.messages[len(prompt) :]))
        found, fate = encoded(row, tokenizer, ctx_len, chat_template, loss)
        samples += [] if fate else found
    fits = len(samples) == len(ANSWERS) and sum(len(ids) - 1 for ids, _ in samples) <= ctx_len
    return Encoded("pairs", samples if fits else [], "" if fits else "left out, since a pair can't be cut")
