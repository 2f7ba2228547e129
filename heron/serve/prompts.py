"""Conversations become the ids that a model reads, in the template that it was fine-tuned with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from heron.data.template import THINKING, Message, Template
from heron.serve.refusals import Refusal
from heron.tokenizer import Tokenizer
from heron.tokenizer.continuation import encode_behind


class Prompt(NamedTuple):
    """What a model reads before it answers."""

    ids: list[int]
    mark: int  # of these ids: up to here, the same conversation has them when it goes on; 0: nowhere
    opened: str  # what the answer begins with, already in `ids`
    stop: tuple[str, ...]  # texts that end the answer


def prompt_of(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    think: str = "",
    pending: Sequence[int] | None = None,
) -> Prompt:
    """The prompt that an answer to `messages` follows.

    Args:
        think: a key of :data:`heron.data.template.THINKING`.
        pending: ids that come before those of the messages and are still to be read; None: nothing comes before.

    Raises:
        Refusal: messages that the template cannot hold.
        DataError: a text that cannot be encoded.
    """
    if not tokenizer.is_text:
        raise Refusal(400, "messages: this model's tokenizer has numbers only; ask /v1/completions", "messages")
    try:
        text = template.prompt(messages, tools, think)
        said = "".join(span.text for span in template.spans(messages, tools))
    except ValueError as error:
        raise Refusal(400, str(error), "messages") from None
    ids, kept = (_encoded(tokenizer, part, pending) for part in (text, os.path.commonprefix([text, said])))
    mark = len(os.path.commonprefix([ids, kept]))
    return Prompt(ids, mark if mark < len(ids) else 0, THINKING[think][1], template.stops(messages, tools))


def conversation_ids(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    pending: Sequence[int] | None = None,
) -> list[int]:
    """The ids of a conversation as it stands, with its last answer. Errors as in :func:`prompt_of`."""
    try:
        text = "".join(span.text for span in template.spans(messages, tools))
    except ValueError as error:
        raise Refusal(400, str(error), "messages") from None
    return _encoded(tokenizer, text, pending)


def _encoded(tokenizer: Tokenizer, text: str, pending: Sequence[int] | None) -> list[int]:
    if pending is None:
        return tokenizer.encode(text)
    return [*pending, *encode_behind(tokenizer, pending, text)]
