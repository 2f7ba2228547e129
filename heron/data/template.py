"""The one chat template: conversations as text, for fine-tuning and for whoever talks with the model afterwards.

The default is that of the released G1 models; a Jinja file, as Hugging Face models have them, can take its place.
Template: BlinkDL/RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt.
"""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from heron.config.finetune import RWKV_TEMPLATE
from heron.errors import ConfigError

STOP = "\n\nUser:"  # what ends an answer
# What `think` puts behind the user's message, and what it opens the answer with.
THINKING = {
    "": ("", ""),
    "on": ("", " <think"),
    "off": ("", " <think>\n</think"),
    "short": (" (think a bit)", " <think"),
    "long": (" (think a lot)", " <think"),
}


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: "system", "user", "assistant" or "tool".
        content: what it says.
        reasoning: of an assistant: what it thought before.
        tool_calls: of an assistant: functions that it calls, each with its "name" and "arguments".
        learned: whether it is learned; None: as the run's `loss` says.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    learned: bool | None = None


class Span(NamedTuple):
    """A piece of a rendered conversation."""

    text: str
    message: int  # whose it is, from 0
    written: bool  # by the message's author, the end of the turn included; else it is a marker that stands in front


class _Form(NamedTuple):
    """How turns are set apart: what opens each, and what stands before and behind its text."""

    opening: Mapping[str, str]
    before: str
    behind: str


_PLAIN = _Form({"system": "System:", "user": "User:", "assistant": "Assistant:"}, " ", "\n\n")
_TOOLS = _Form(
    {"system": "### System\n", "user": "### User\n", "assistant": "### Assistant\n", "tool": "### Tool Output\n"},
    "", "\n",
)  # fmt: skip


class RwkvTemplate:
    """The template of the G1 models; conversations with tools have the form in which these were trained to call."""

    name = RWKV_TEMPLATE
    markers = "System: a\n\nUser: b\n\nAssistant: c\n\n### Tool Output\n"

    def spans(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), closed: bool = False
    ) -> list[Span]:
        """The text of a conversation, piece by piece.

        An answer is written from behind "Assistant:" to its end: the empty line, and what opens the turn that follows,
        since with both the one who listens knows that it is over.

        Args:
            closed: whether a user's turn opens behind the last answer, as where no id can tell that it is over.

        Raises:
            ValueError: an answer with text in it that ends a turn; the message names the field.
        """
        form = _form_of(messages, tools)
        found, is_open = [], False  # whether the end of the answer before has opened the turn
        if tools and messages[0].role != "system":
            found.append(Span(form.opening["system"] + _described(tools, "") + form.behind, 0, False))
        for number, message in enumerate(messages):
            if not is_open:
                found.append(Span(form.opening[message.role], number, False))
            text = _described(tools, cleaned(message.content)) if message.role == "system" else _text(message)
            follows, end = messages[number + 1].role if number + 1 < len(messages) else None, form.behind
            is_open = message.role == "assistant" and (follows is not None or closed)
            if is_open:
                end += form.opening[follows or "user"]
            if message.role == "assistant":
                _check_answer(form, text, number)
            found.append(Span(form.before + text + end, number, True))
        return found

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), think: str = "") -> str:
        """The text that an assistant's answer follows; `think` is a key of THINKING."""
        level, opened = THINKING[think]
        *before, last = messages
        if level and last.role == "user":
            last = dataclasses.replace(last, content=cleaned(last.content) + level)
        asked = [*before, last, Message("assistant", ".")]
        return "".join(span.text for span in self.spans(asked, tools)[:-1]) + opened

    def stops(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> tuple[str, ...]:
        """The texts that end an answer to `messages`, none of which may stand in one."""
        form = _form_of(messages, tools)
        return tuple(form.behind + opening.strip() for role, opening in form.opening.items() if role != "system")


class JinjaTemplate:
    """A chat template in Jinja, as Hugging Face models have them, run in Jinja's immutable sandbox.

    It sees `messages`, `tools` and `add_generation_prompt`. Where an answer begins and ends is found by rendering the
    conversation up to there, so what comes later must not change what stood before.

    Raises:
        ConfigError: a file that can't be read, or is no template.
    """

    markers = ""

    def __init__(self, path: str) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.name = path
        try:
            source = Path(path).read_text(encoding="utf-8")
            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
            )
            environment.globals["raise_exception"] = _refuse
            self._template = environment.from_string(source)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"template {path}: {getattr(error, 'strerror', None) or error}") from None
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"template {path}, line {error.lineno}: {error.message}") from None

    def spans(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), closed: bool = False
    ) -> list[Span]:
        """As :meth:`RwkvTemplate.spans`; what ends a turn is for the template to say, `closed` or not.

        Raises:
            ValueError: the template fails, or changes what stood before; the message names the field.
        """
        whole, at, found = self._rendered(messages, tools), 0, []
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            for end, written in (
                (self._rendered(messages[:number], tools, opens=True), False),
                (self._rendered(messages[: number + 1], tools), True),
            ):
                if not whole.startswith(end) or len(end) < at:
                    raise ValueError(
                        f"messages[{number}]: {self.name} makes another text of the conversation up to here than the "
                        "whole has there, so nothing tells which text is learned"
                    )
                # What stands before an answer is of the message that it answers.
                found.append(Span(whole[at : len(end)], number if written else max(number - 1, 0), True))
                at = len(end)
        if at < len(whole):
            found.append(Span(whole[at:], len(messages) - 1, True))
        return found

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), think: str = "") -> str:
        """As :meth:`RwkvTemplate.prompt`; ValueError for a `think`, of which a template in Jinja knows nothing."""
        if think:
            raise ValueError(f"think {think!r}: the template {self.name} has no levels of thinking; leave it out")
        return self._rendered(messages, tools, opens=True)

    def stops(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> tuple[str, ...]:
        """No texts: an id ends an answer."""
        return ()

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], opens: bool = False) -> str:
        as_dicts = []
        for one in messages:
            fields: dict[str, Any] = {"role": one.role, "content": one.content}
            if one.reasoning:
                fields["reasoning_content"] = one.reasoning
            if one.tool_calls:
                fields["tool_calls"] = [{"type": "function", "function": dict(call)} for call in one.tool_calls]
            as_dicts.append(fields)
        try:
            return self._template.render(
                messages=as_dicts, tools=list(tools) or None, add_generation_prompt=opens, bos_token="", eos_token=""
            )
        except Exception as error:  # a template is a program, which may fail in any way
            raise ValueError(f"the template {self.name} failed: {type(error).__name__}: {error}") from None


Template = RwkvTemplate | JinjaTemplate


def load(name: str) -> Template:
    """The template that `name` says: "rwkv", or a FILE.jinja. ConfigError as for :class:`JinjaTemplate`."""
    return RwkvTemplate() if name == RWKV_TEMPLATE else JinjaTemplate(name)


def cleaned(text: str) -> str:
    """A message as the template has it: no control characters, no empty lines, no space around it."""
    return re.sub(r"\n{2,}", "\n", _plain(text)).strip()


def is_control(character: str) -> bool:
    """Whether a character is one for the terminal, or turns the direction of writing."""
    return unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in (
        "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI",
    )  # fmt: skip


def _plain(text: str) -> str:
    text = text.replace("\r\n", "\n")
    if text.replace("\n", "").replace("\t", "").isprintable():  # as nearly all are, and control characters are not
        return text
    return "".join(c for c in text if c in "\n\t" or not is_control(c))


def _form_of(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> _Form:
    return _TOOLS if tools or any(one.role == "tool" or one.tool_calls for one in messages) else _PLAIN


def _check_answer(form: _Form, text: str, number: int) -> None:
    for role, opening in form.opening.items():
        end = form.behind + opening.strip()
        if role != "system" and end in text:
            raise ValueError(f"messages[{number}].content: wanted an answer without {end!r}, which would end the turn")


def _text(message: Message) -> str:
    """What a turn says, as the template has it."""
    if message.role == "user":
        return cleaned(message.content)
    if message.role == "tool":
        return f"```json\n{_plain(message.content).strip()}\n```"
    thought = f"<think>\n{_plain(message.reasoning).strip()}\n</think>" if message.reasoning else ""
    calls = [f"**Tool Call:**\n{_json_block(call)}" for call in message.tool_calls]
    return "\n".join(part for part in (thought, _plain(message.content).strip(), *calls) if part)


def _described(tools: Sequence[Mapping[str, Any]], system: str) -> str:
    """A system text with the functions that may be called."""
    parts = [] if not system else [system]
    for tool in tools:
        described = f"**Description:** {cleaned(str(tool.get('description', '')))}\n"
        parts.append(f"### `{tool['name']}`\n{described}**Parameters:**\n{_json_block(tool.get('parameters', {}))}")
    return "\n\n".join(parts)


def _json_block(value: Any) -> str:
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```"


def _refuse(message: str) -> None:
    raise ValueError(message)
