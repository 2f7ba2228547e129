"""Conversations as training data: jsonl rows in any of the usual forms -> ids, and which of them are learned.

Everything that can be wrong with a row is found here, before training starts, and told with its line and field.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from heron.data import jsonl
from heron.data.fingerprint import fingerprint
from heron.data.loader import TEXT_VAL_FRACTION, Corpus
from heron.data.template import Message, Template
from heron.errors import ConfigError, DataError
from heron.tokenizer import Tokenizer
from heron.tokenizer.continuation import encode_marked

_ROLES = {
    "system": "system", "developer": "system", "human": "user", "user": "user", "gpt": "assistant",
    "chatgpt": "assistant", "model": "assistant", "assistant": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
_MAY_FOLLOW = {  # what may stand before a turn; None: nothing
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_FORMS = "messages, prompt and completion, text, instruction and output (alpaca), or conversations (ShareGPT)"


class Sample(NamedTuple):
    """One conversation, or what of it fits a sample."""

    ids: np.ndarray  # (n,) of the whole, n >= 2
    learned: np.ndarray  # (n,) bool: whether an id is learned
    where: str  # file and line


class Samples:
    """Conversations one behind another.

    Attributes:
        ids: (n_tokens,) of all of them.
        learned: (n_tokens,) bool.
        offsets: (n + 1,): conversation i has the ids from ``offsets[i]`` to ``offsets[i + 1]``.
        where: file and line of each.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.ids = np.concatenate([sample.ids for sample in samples])
        self.learned = np.concatenate([sample.learned for sample in samples])
        self.offsets = np.cumsum([0, *(len(sample.ids) for sample in samples)])
        self.where = [sample.where for sample in samples]

    @classmethod
    def of(cls, rows: Iterable[list[Sample]]) -> Samples:
        """The samples of rows that have several."""
        return cls([sample for row in rows for sample in row])

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, number: int) -> Sample:
        part = slice(self.offsets[number], self.offsets[number + 1])
        return Sample(self.ids[part], self.learned[part], self.where[number])


@dataclasses.dataclass(frozen=True)
class Conversations(Corpus):
    """A corpus of conversations, or of other sequences that are apart: `train` and `val` are the ids of these samples.

    Attributes:
        samples: to train on.
        val_samples: for validation; None: without.
        mix: the second corpus that training samples are mixed with; None: none.
    """

    samples: Samples
    val_samples: Samples | None
    mix: Corpus | None = None

    @property
    def prompt(self) -> np.ndarray:
        """The ids before the first answer, of the first validation conversation, else of the first of all."""
        ids, learned, _ = (self.val_samples or self.samples)[0]
        return ids[: max(1, int(learned[1:].argmax()) + 1)]


class Row(NamedTuple):
    """What a row says: a conversation with its tools, or parts of a text of which some are learned."""

    form: str
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    parts: tuple[tuple[str, bool], ...] = ()


class Encoded(NamedTuple):
    """The samples of a row."""

    form: str
    samples: list[tuple[np.ndarray, np.ndarray]]  # ids, and which are learned
    fate: str  # of a row that is too long, in words that a number can stand before


Encode = Callable[[Mapping[str, Any], Tokenizer, int, Template, str], Encoded]


def load(
    data: str,
    tokenizer: Tokenizer,
    ctx_len: int,
    chat_template: Template,
    loss: str = "assistant",
    val_data: str | None = None,
    val_fraction: float | None = None,
    say: Callable[[str], None] | None = None,
    mix: Corpus | None = None,
    encode: Encode | None = None,
) -> Conversations:
    """Read conversations, and keep the last of them for validation unless `val_data` is given.

    Args:
        data: a jsonl, or a JSON array of rows; packed or not (see :mod:`heron.data.files`).
        ctx_len: tokens that a conversation may have (and one more, which is only predicted). A longer one is cut
            between messages; a text, which has none, is cut anywhere.
        loss: "assistant" or "all": what is learned of messages that don't say it themselves.
        val_fraction: of the conversations; None: 0.1.
        say: takes a line about what was read, and one about what was too long.
        encode: what makes samples of a row; None: :func:`encode_row`.

    Raises:
        ConfigError: a tokenizer that can't hold the template.
        DataError: a row that is no conversation, or of which nothing is learned (file, line and field are named); data
            without a conversation.
    """
    check_tokenizer(tokenizer, chat_template)
    encode = encode or encode_row
    train = _read(data, tokenizer, ctx_len, chat_template, loss, say, encode)
    val = None if val_data is None else _read(val_data, tokenizer, ctx_len, chat_template, loss, say, encode)
    return divided(data, train, val, val_fraction, "conversations", mix)


def divided(
    data: str,
    train: list[list[Sample]],
    val: list[list[Sample]] | None,
    val_fraction: float | None,
    kind: str,
    mix: Corpus | None = None,
) -> Conversations:
    """The corpus of rows, each of one sample or several; without `val`, the last `val_fraction` of the rows is it."""
    if val is None:
        n_val = int(len(train) * (TEXT_VAL_FRACTION if val_fraction is None else val_fraction))
        if val_fraction and not n_val:
            raise DataError(f"{data}: val_fraction {val_fraction} of {len(train)} {kind} is none; give 0 or more")
        train, val = train[: len(train) - n_val], train[len(train) - n_val :]
    samples, val_samples = Samples.of(train), Samples.of(val) if val else None
    parts = (samples.ids, samples.learned, samples.offsets)
    of_val = () if val_samples is None else (val_samples.ids, val_samples.learned, val_samples.offsets)
    of_mix = () if mix is None else (mix.train,)
    return Conversations(
        samples.ids, None if val_samples is None else val_samples.ids, None, Path(data).name,
        fingerprint(*parts, *of_val, *of_mix), kind, samples, val_samples, mix,
    )  # fmt: skip


def check_tokenizer(tokenizer: Tokenizer, chat_template: Template) -> None:
    """ConfigError for a tokenizer under which the template's markers are not what they were."""
    if not tokenizer.is_text:
        raise ConfigError(f"tokenizer {tokenizer.spec}: has numbers only, and conversations are text; name another")
    markers = chat_template.markers
    try:
        back = tokenizer.decode(tokenizer.encode(markers))
    except DataError as error:
        raise ConfigError(
            f"tokenizer {tokenizer.spec}: can't hold the template {chat_template.name}: {error}"
        ) from None
    if back.strip() != markers.strip():
        raise ConfigError(
            f"tokenizer {tokenizer.spec}: can't hold the template {chat_template.name}: {markers!r} comes back as "
            f"{back!r}; name another tokenizer, or a template made for it"
        )


def _read(
    data: str,
    tokenizer: Tokenizer,
    ctx_len: int,
    chat_template: Template,
    loss: str,
    say: Callable[[str], None] | None,
    encode: Encode,
) -> list[list[Sample]]:
    """The samples of each row that has any."""
    forms: Counter[str] = Counter()
    fates: Counter[str] = Counter()

    def parse(fields: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        try:
            row = encode(fields, tokenizer, ctx_len, chat_template, loss)
        except DataError as error:  # of the tokenizer
            raise ValueError(str(error)) from None
        forms[row.form] += 1
        fates[row.fate] += 1
        return row.samples

    path = Path(data)
    if not path.is_file():
        raise DataError(f"{data}: wanted a jsonl of conversations, and there is no such file")
    rows = [[Sample(*arrays, where) for arrays in found] for where, found in jsonl.read(path, parse) if found]
    n_rows, samples = forms.total(), [sample for row in rows for sample in row]
    if not rows:
        what = "holds no conversation" if not n_rows else f"nothing that is learned fits ctx_len {ctx_len}; raise it"
        raise DataError(f"{data}: {what}")
    if say is not None:
        n_tokens, n_learned = sum(len(s.ids) for s in samples), sum(int(s.learned[1:].sum()) for s in samples)
        kinds = ", ".join(f"{form}: {n:,}" for form, n in forms.items())
        say(f"{path.name}: {n_rows:,} rows ({kinds}), {n_tokens:,} tokens, of which {n_learned:,} are learned")
        told = [f"{n:,} {fate}" for fate, n in fates.items() if fate]
        if told:
            say(f"{path.name}: longer than ctx_len {ctx_len}: {'; '.join(told)}")
    return rows


def encode_row(
    fields: Mapping[str, Any], tokenizer: Tokenizer, ctx_len: int, chat_template: Template, loss: str
) -> Encoded:
    """The samples of a row in one of the usual forms; ValueError, with the field, for what is none."""
    row = row_of(fields)
    return Encoded(row.form, *encoded(row, tokenizer, ctx_len, chat_template, loss))


def encoded(
    row: Row, tokenizer: Tokenizer, ctx_len: int, chat_template: Template, loss: str
) -> tuple[list[tuple[np.ndarray, np.ndarray]], str]:
    """The ids of a row's samples, which of them are learned, and a fate as in :class:`Encoded`."""
    room = ctx_len + 1
    if not row.messages:
        ids, learned = _ended(*encode_marked(tokenizer, row.parts), tokenizer)
        if row.form == "text" and len(ids) > room:
            starts = range(0, len(ids) - 1, ctx_len)
            return [(ids[i : i + room], learned[i : i + room]) for i in starts], "texts cut into several samples"
        if not learned[1:].any():
            raise ValueError("nothing of it is learned: wanted at least two tokens, one of them in the completion")
        return ([(ids, learned)], "") if len(ids) <= room else ([], "left out, since a completion can't be cut")
    is_learned = [
        (message.role == "assistant" or loss == "all") if message.learned is None else message.learned
        for message in row.messages
    ]
    if not any(is_learned):
        raise ValueError("messages: nothing of it is learned: wanted an answer, or a message with weight 1")
    last = max(number for number, flag in enumerate(is_learned) if flag)
    n_messages = n_all = last + 1 if loss != "all" else len(row.messages)
    while n_messages:
        spans = chat_template.spans(row.messages[:n_messages], row.tools, closed=tokenizer.eod is None)
        marked = [(span.text, is_learned[span.message] and (span.written or loss == "all")) for span in spans]
        ids, learned = _ended(*encode_marked(tokenizer, marked), tokenizer)
        if not learned[1:].any():
            raise ValueError("messages: the template leaves no text of what is learned")
        if len(ids) <= room:
            return [(ids, learned)], "" if n_messages == n_all else "cut behind the last answer that fits"
        # The messages before: up to the last that is learned.
        n_messages = max((number + 1 for number in range(n_messages - 1) if is_learned[number]), default=0)
        if not any(row.messages[number].role == "assistant" for number in range(n_messages)):
            n_messages = 0
    return [], "left out, since nothing up to the first answer's end fits"


def _ended(ids: list[int], learned: list[bool], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """With the id that ends a document, which is learned where what stands before it is."""
    if tokenizer.eod is not None and ids and ids[-1] != tokenizer.eod:
        ids, learned = [*ids, tokenizer.eod], [*learned, learned[-1]]
    return np.array(ids, dtype=np.int64), np.array(learned, dtype=bool)


# -- forms ----------------------------------------------------------------------------------------------------------


def row_of(fields: Mapping[str, Any]) -> Row:
    """What a row says, whose form its keys tell. ValueError, with the field, for what is none of the forms."""
    if "messages" in fields:
        return _conversation("messages", fields["messages"], fields, "role", "content")
    if "conversations" in fields:
        return _conversation("conversations", fields["conversations"], fields, "from", "value")
    if "instruction" in fields and "output" in fields:
        return _alpaca(fields)
    if "prompt" in fields and "completion" in fields:
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _conversation("prompt and completion", prompt + completion, fields, "role", "content")
        row = dict(fields)
        if not jsonl.text(row, "completion").strip():
            raise ValueError("completion: the answer is empty")
        parts = (jsonl.text(row, "prompt"), False), (jsonl.text(row, "completion"), True)
        return Row("prompt and completion", parts=parts)
    if "text" in fields:
        if not (text := jsonl.text(dict(fields), "text")):
            raise ValueError("text: is empty")
        return Row("text", parts=((text, True),))
    raise ValueError(f"wanted the keys of a conversation: {_FORMS}; got {', '.join(map(repr, fields)) or 'none'}"[:400])


def _alpaca(fields: Mapping[str, Any]) -> Row:
    row = {"input": "", "system": "", **{key: value for key, value in fields.items() if value is not None}}
    system, asked = jsonl.text(row, "system"), jsonl.text(row, "instruction")
    if jsonl.text(row, "input").strip():
        asked = f"{asked}\n{row['input']}"
    messages = [Message("system", system)] if system.strip() else []
    messages += [Message("user", asked), Message("assistant", jsonl.text(row, "output"))]
    if not row["output"].strip():
        raise ValueError("output: the answer is empty")
    if not asked.strip():
        raise ValueError("instruction: is empty")
    return Row("alpaca", tuple(messages))


def _conversation(form: str, turns: Any, fields: Mapping[str, Any], role_key: str, text_key: str) -> Row:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{form}: wanted a list of at least one message, got {turns!r:.80}")
    messages = [_message(f"{form}[{n}]", turn, role_key, text_key) for n, turn in enumerate(turns)]
    if role_key == "from" and isinstance(fields.get("system"), str) and fields["system"].strip():
        messages.insert(0, Message("system", fields["system"]))
    before = None
    for number, message in enumerate(messages):
        if before not in _MAY_FOLLOW[message.role]:
            behind = f"behind {before}" if before else "at the beginning"
            wanted = " or ".join(role for role, places in _MAY_FOLLOW.items() if before in places)
            raise ValueError(
                f"{form}[{number}].{role_key}: roles out of order: {message.role} {behind}; wanted {wanted}"
            )
        before = message.role
    return Row(form, tuple(messages), tuple(_tools(fields.get("tools"))))


def _message(field: str, turn: Any, role_key: str, text_key: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{field}: wanted an object, got {type(turn).__name__}")
    if turn.get(role_key) not in tuple(_ROLES):
        known = ", ".join(dict.fromkeys(_ROLES.values())) if role_key == "role" else "human, gpt, system, observation"
        raise ValueError(f"{field}.{role_key}: wanted {known}, got {turn.get(role_key)!r:.80}")
    role = _ROLES[turn[role_key]]
    content = _content(f"{field}.{text_key}", turn.get(text_key))
    calls = _calls(f"{field}.tool_calls", turn.get("tool_calls"))
    if turn[role_key] == "function_call":
        calls, content = _calls(f"{field}.{text_key}", [content]), ""
    if calls and role != "assistant":
        raise ValueError(f"{field}.tool_calls: an assistant calls tools, this is {role}")
    if role in ("assistant", "user") and not content.strip() and not calls:
        raise ValueError(f"{field}.{text_key}: {'the answer is empty' if role == 'assistant' else 'is empty'}")
    reasoning = _content(f"{field}.reasoning_content", turn.get("reasoning_content"))
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"{field}.weight: wanted 0 or 1, got {weight!r:.80}")
    return Message(role, content, reasoning, calls, None if weight is None else bool(weight))


def _content(field: str, value: Any) -> str:
    """A text, or the texts of OpenAI's content parts."""
    if isinstance(value, list):
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
            raise ValueError(f"{field}: wanted text, got parts of another type; nothing else is understood")
        value = "".join(_content(f"{field}[{n}].text", part.get("text")) for n, part in enumerate(value))
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{field}: wanted a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field}: character {error.start} is half a surrogate pair") from None
    return value


def _calls(field: str, calls: Any) -> tuple[dict[str, Any], ...]:
    """Function calls with their names and arguments, from OpenAI's form or the bare one; arguments may be JSON."""
    if calls is None:
        return ()
    if not isinstance(calls, list):
        raise ValueError(f"{field}: wanted a list, got {type(calls).__name__}")
    found = []
    for number, call in enumerate(calls):
        call = _json(f"{field}[{number}]", call)
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{field}[{number}]: wanted a function with its name and arguments, got {call!r:.80}")
        arguments = _json(f"{field}[{number}].arguments", function.get("arguments", {}))
        found.append({"name": function["name"], "arguments": arguments})
    return tuple(found)


def _tools(tools: Any) -> Iterable[Mapping[str, Any]]:
    tools = _json("tools", tools)
    if tools is None:
        return
    if not isinstance(tools, list):
        raise ValueError(f"tools: wanted a list, got {type(tools).__name__}")
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"tools[{number}]: wanted a function with its name, got {tool!r:.80}")
        yield function


def _json(field: str, value: Any) -> Any:
    """`value`, or what it says in JSON where it is a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{field}: wanted JSON, got {value!r:.60}: {error}") from None
