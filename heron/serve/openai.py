"""Requests as OpenAI's interface has them, with bounds on every number and length; unknown fields are refused.

Fields of ours are those that OpenAI's lacks: they are listed under "Heron's own" in each request.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from heron import strict_json
from heron.config import LARGEST_SEED
from heron.config.serve import NAME
from heron.data.template import Message
from heron.serve.refusals import Refusal

MOST_ANSWERS = 16  # to one prompt
MOST_STOPS, LONGEST_STOP = 8, 256
MOST_MESSAGES, MOST_PARTS, MOST_TOOLS, MOST_PROMPTS = 4096, 4096, 128, 256
MOST_BIASES = 1024
FUNCTION_NAME = r"^[A-Za-z0-9_-]{1,64}$"
_EFFORTS = {"none": "off", "minimal": "off", "low": "short", "medium": "on", "high": "long", "xhigh": "long"}

Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Think = Literal["", "on", "off", "short", "long"]  # keys of heron.data.template.THINKING
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
StateName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
# Of a long list the first error is enough: a million of them would hold up every stream.
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=1 << 20, fail_fast=True)]

Texts = str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class _Loose(BaseModel):
    """What clients send along from the server's own answers: fields that say nothing here are passed over."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


# -- what several requests have ---------------------------------------------------------------------------------------


class Sampled(_Strict):
    """How tokens are drawn."""

    model: str = Field("", max_length=200, description="a name that /v1/models lists; empty: the first")
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MOST_BIASES)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(1, ge=1, le=MOST_ANSWERS)
    # Heron's own
    top_k: int | None = Field(None, ge=0, le=1 << 20, description="keep at most so many tokens; 0: any number")
    penalty_decay: float | None = Field(None, ge=0, le=1, description="both penalties fade by this with each token")
    count_digits: bool | None = None
    session_id: StateName | None = Field(None, description="keep where this text ends, for /v1/states to save")
    state: StateName | None = Field(None, description="begin from this saved state; else where the session began")
    # of OpenAI's servers alone
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def biases(self) -> dict[int, float]:
        """By token id. Refusal for a key that is no id."""
        found = {}
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise Refusal(400, f"logit_bias: wanted token ids as keys, got {key[:40]!r}", "logit_bias")
            found[int(key)] = value
        return found


class StreamOptions(_Loose):
    include_usage: bool | None = False


class Function(_Loose):
    """A function that the model may call."""

    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = Field("", max_length=1 << 16)
    parameters: dict[str, Any] | None = None

    @property
    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "description": self.description or "", "parameters": self.parameters or {}}


class JsonSchema(_Loose):
    name: str = Field("answer", max_length=64)
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(_Loose):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


# -- /v1/chat/completions ---------------------------------------------------------------------------------------------


class TextPart(_Loose):
    """A piece of a message; pictures and sounds are refused."""

    type: Literal["text", "input_text", "output_text"]
    text: str


def _none_as_empty(content: Any) -> Any:
    return "" if content is None else content


Content = Annotated[
    str | Annotated[list[TextPart], Field(max_length=MOST_PARTS, fail_fast=True)], BeforeValidator(_none_as_empty)
]


class CalledFunction(_Loose):
    name: str = Field(pattern=FUNCTION_NAME)
    arguments: str = ""


class ToolCall(_Loose):
    id: str = Field("", max_length=200)
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Loose):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = ""
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MOST_TOOLS)
    tool_call_id: str | None = Field(None, max_length=200)

    def as_message(self) -> Message:
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        calls = tuple(called(call.function.name, call.function.arguments) for call in self.tool_calls or ())
        if calls and role != "assistant":
            raise Refusal(400, f"messages: an assistant calls tools, this is {role}", "messages")
        return Message(role, text_of(self.content), self.reasoning_content or "", calls)


class Tool(_Loose):
    type: Literal["function"]
    function: Function


class NamedFunction(_Loose):
    name: str = Field(pattern=FUNCTION_NAME)


class NamedTool(_Loose):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampled):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    verbosity: Any = None  # of OpenAI's servers alone
    # Heron's own
    think: Think | None = Field(None, description="as heron chat --think; reasoning_effort says it in OpenAI's words")

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The messages as the template takes them, which names no call: results stand in the order of the calls."""
        ordered: list[ChatMessage] = []
        order: dict[str | None, int] = {}
        for is_result, group in itertools.groupby(self.messages, lambda one: one.role == "tool"):
            several = list(group)
            if is_result:
                several.sort(key=lambda one: order.get(one.tool_call_id, len(order)))
            else:
                order = {call.id: number for number, call in enumerate(several[-1].tool_calls or ())}
            ordered += several
        return tuple(one.as_message() for one in ordered)

    @property
    def forced(self) -> str | None:
        """The function that must be called; empty: any; None: none must be."""
        if isinstance(self.tool_choice, NamedTool):
            return self.tool_choice.function.name
        return "" if self.tool_choice == "required" else None


# -- /v1/completions --------------------------------------------------------------------------------------------------


class CompletionRequest(Sampled):
    """The body of /v1/completions."""

    prompt: Texts = ""
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = False
    best_of: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    suffix: None = None
    # Heron's own
    stop_ids: Ids | None = Field(None, max_length=64)

    @property
    def prompts(self) -> list[str | list[int]]:
        return _texts(self.prompt)


# -- /v1/responses ----------------------------------------------------------------------------------------------------


class InputItem(_Loose):
    """An item of a response's input: a message, a call of the model's, or what a function gave."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content = ""
    name: str | None = Field(None, pattern=FUNCTION_NAME)
    arguments: str | None = None
    output: Content = ""


class FlatTool(Function):
    type: Literal["function"]


class NamedFlatTool(_Loose):
    type: Literal["function"]
    name: str = Field(pattern=FUNCTION_NAME)


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"] = "text"


class TextSettings(_Loose):
    format: TextFormat | None = None
    verbosity: Any = None


class Reasoning(_Loose):
    effort: Effort | None = None


class ResponsesRequest(_Strict):
    """The body of /v1/responses."""

    model: str = Field("", max_length=200)
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: str | None = None
    previous_response_id: str | None = Field(None, pattern=r"^resp_[0-9a-f]{1,64}$")
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    stream: bool | None = False
    store: bool | None = True
    tools: list[FlatTool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedFlatTool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    # Heron's own
    seed: Seed | None = None
    state: StateName | None = None
    # of OpenAI's servers alone
    include: Any = None
    metadata: Any = None
    parallel_tool_calls: Any = None
    service_tier: Any = None
    truncation: Any = None
    user: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


# -- the rest ---------------------------------------------------------------------------------------------------------


class EmbeddingsRequest(_Strict):
    """The body of /v1/embeddings."""

    model: str = Field("", max_length=200)
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: Any = None

    @property
    def texts(self) -> list[str | list[int]]:
        return _texts(self.input)


class TokenizeRequest(_Strict):
    model: str = Field("", max_length=200)
    text: str


class DetokenizeRequest(_Strict):
    model: str = Field("", max_length=200)
    ids: Ids


class StateRequest(_Strict):
    """What becomes a saved state: exactly one of the last three is given."""

    name: StateName = Field(description="of the state that is written")
    model: str = Field("", max_length=200)
    session_id: StateName | None = Field(None, description="save this session as a state")
    response_id: str | None = Field(None, pattern=r"^resp_[0-9a-f]{1,64}$", description="save what was read up to here")
    fork: StateName | None = Field(None, description="copy this state")


class LoadRequest(_Strict):
    session_id: StateName = Field(description="the session that begins from the state")
    model: str = Field("", max_length=200)


# -- from words to ours -----------------------------------------------------------------------------------------------


def _texts(given: str | list[Any]) -> list[str | list[int]]:
    """The texts of a field that holds one text, the ids of one, or several of both."""
    is_one = isinstance(given, str) or all(isinstance(one, int) for one in given)
    return [given] if is_one else list(given)


def text_of(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def called(name: str, arguments: str) -> dict[str, Any]:
    """A call as the template writes it; arguments that are no JSON stay a text."""
    try:
        value = strict_json.loads((arguments or "{}").encode("utf-8", "surrogatepass"))
    except ValueError:
        value = arguments
    return {"name": name, "arguments": value}


def think_of(effort: str | None, think: str | None) -> str:
    """The template's level of thinking."""
    return think if think is not None else _EFFORTS.get(effort or "", "")
