"""What is read before an answer, what an answer may be, and how it is taken apart."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from heron import tokenizer
from heron.data.template import JinjaTemplate, Message, RwkvTemplate
from heron.generation import Request
from heron.serve.chat import Answer
from heron.serve.grammar import Grammars
from heron.serve.jobs import Job
from heron.serve.openai import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingsRequest, ResponsesRequest
from heron.serve.orders import Drawn, Order
from heron.serve.parts import Call, Parts
from heron.serve.prompts import prompt_of
from heron.serve.refusals import Refusal

BYTES, WORLD = tokenizer.load("bytes"), tokenizer.load("world")
USER = (Message("user", "hello"),)


def taken_apart(text, opened="", has_tools=False, step=1):
    parts, found = Parts(opened, has_tools), []
    for start in range(0, len(text), step):
        found += parts.push(text[start : start + step])
    found += parts.flush()
    calls = [part.call for part in found if part.call]
    return "".join(part.reasoning for part in found), "".join(part.content for part in found), calls


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("opened", "text", "reasoning", "content"),
    [
        ("", " hello <b> you \n", "", "hello <b> you \n"),
        ("", " <thin", "", "<thin"),
        (" <think", ">\nIs it < 3?\n</thi </think>\n\nYes", "Is it < 3?\n</thi", "Yes"),
        (" <think", ">\nstill thin", "still thin", ""),
        (" <think>\n</think", ">\nYes", "", "Yes"),
        ("", "<think>a</think>b", "a", "b"),
    ],
)
def test_a_thought_is_told_from_the_answer_however_it_comes(step, opened, text, reasoning, content):
    assert taken_apart(text, opened, step=step) == (reasoning, content, [])


@pytest.mark.parametrize(("finish", "content"), [("end", "A reed.\n\nTwo."), ("length", "A reed.\n\nTwo.\n\n")])
def test_the_empty_line_before_the_end_of_a_document_is_no_part_of_an_answer(finish, content):
    answer = Answer(0, None, Parts())
    for drawn in (Drawn(0, " A reed."), Drawn(0, "\n\nTwo."), Drawn(0, "\n\n", finish=finish)):
        answer.take(drawn)
    assert answer.content == content


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_calls_are_the_inverse_of_the_template(step):
    calls = ({"name": "paint", "arguments": {"colour": "red"}}, {"name": "wait", "arguments": {}})
    said = Message("assistant", "Let me see.", "", calls)
    text = RwkvTemplate().spans([*USER, said])[-1].text
    expected = [Call(call["name"], json.dumps(call["arguments"])) for call in calls]
    assert taken_apart(text, has_tools=True, step=step) == ("", "Let me see.", expected)


HALF_A_PAIR = r'{"name": "f", "arguments": {"a": "\ud800"}}'  # no text in UTF-8 holds it, so no answer does


@pytest.mark.parametrize(
    "block",
    [
        "{", "[1]", '{"name": 3}', "x" * 9, "[" * 100_000,
        HALF_A_PAIR, HALF_A_PAIR.replace("f", r"\ud800"), '{"name": "f", "arguments": {"a": NaN}}',
    ],
)  # fmt: skip
def test_a_block_that_calls_nothing_stays_text(block):
    text = f"**Tool Call:**\n```json\n{block}\n```"
    assert taken_apart(text, has_tools=True, step=10_000) == ("", text, [])


def test_arguments_that_are_nested_too_deep_are_a_text_in_the_conversation():
    answer = Answer(0, Job(Order(Request([1]), 1)), Parts(has_tools=True))
    arguments = "[" * 10_000
    block = json.dumps({"name": "f", "arguments": arguments})
    answer.take(Drawn(0, f"**Tool Call:**\n```json\n{block}\n```", finish="end"))
    assert answer.message.tool_calls == ({"name": "f", "arguments": arguments},)


def test_the_mark_of_a_prompt_is_where_the_next_turn_goes_on():
    first = prompt_of(RwkvTemplate(), WORLD, USER, think="short")
    grown = (*USER, Message("assistant", "hi"), Message("user", "well?"))
    second = prompt_of(RwkvTemplate(), WORLD, grown, think="short")
    assert 0 < first.mark < len(first.ids)
    assert second.ids[: first.mark] == first.ids[: first.mark]
    assert first.opened == " <think"
    assert "\n\nUser:" in first.stop


def test_tools_have_a_form_and_stops_of_their_own():
    prompt = prompt_of(RwkvTemplate(), BYTES, USER, tools=[{"name": "paint"}])
    assert BYTES.decode(prompt.ids).endswith("### Assistant\n")
    assert "\n### User" in prompt.stop
    told = prompt_of(RwkvTemplate(), BYTES, (*USER, Message("assistant", "a"), Message("tool", "1")), think="short")
    assert "(think" not in BYTES.decode(told.ids)  # a function's output is not told how to think


def test_what_functions_gave_stands_in_the_order_of_the_calls():
    def call(number):
        return {"id": f"call_{number}", "type": "function", "function": {"name": f"f{number}"}}

    def result(number):
        return {"role": "tool", "tool_call_id": f"call_{number}", "content": str(number)}

    first = {"role": "assistant", "tool_calls": [call(2), call(1)]}
    then = {"role": "assistant", "tool_calls": [call(4), call(3)]}
    unknown = {"role": "tool", "content": "?"}
    messages = [first, result(1), unknown, result(2), then, result(4), result(3)]
    asked = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hello"}, *messages]})
    assert [one.content for one in asked.conversation if one.role == "tool"] == ["2", "1", "?", "4", "3"]


def test_a_jinja_template_has_no_levels_of_thinking(tmp_path):
    (tmp_path / "a.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
                                      "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
    template = JinjaTemplate(str(tmp_path / "a.jinja"))
    assert BYTES.decode(prompt_of(template, BYTES, USER).ids) == "<user>hello<assistant>"
    with pytest.raises(Refusal, match="no levels of thinking"):
        prompt_of(template, BYTES, USER, think="short")


def follows(grammar, text, which):
    for token in which.encode(text):
        if not grammar.allowed()[token]:
            return False
        grammar.accept(token)
    return grammar.is_over


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize("which", [BYTES, WORLD], ids=["bytes", "world"])
@pytest.mark.parametrize(
    ("text", "opened", "is_right"),
    [
        (' {"a": 12}', "", True),
        ('{\n  "a": 12\n}', "", True),
        ('{"a": "12"}', "", False),
        ('{"b": 1}', "", False),
        ('>\n{"a": 1}', " <think>\n</think", True),
        ('> hm </think>\n{"a": 1}', " <think", True),
        ('{"a": 1}', " <think", False),
    ],
)
def test_a_grammar_lets_what_the_schema_says_through(which, text, opened, is_right):
    grammar = Grammars(which).of_json(SCHEMA, "response_format", opened)
    assert follows(grammar, text, which) == is_right
    assert grammar.allowed().shape == (which.vocab_size,)
    if is_right:
        assert grammar.is_complete
        assert grammar.allowed().nonzero().flatten().tolist() == [0]  # the end of a document


def test_a_tokenizer_without_an_end_can_be_told_what_to_write():
    class Endless(type(BYTES)):
        eod = None

    grammar = Grammars(Endless()).of_json(SCHEMA, "response_format")
    assert follows(grammar, '{"a": 1}', BYTES)
    assert grammar.is_complete


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"}, {"anyOf": []}, {"$ref": "http://example.org/schema"}, {"$ref": "#/nowhere"},
        {"type": "string", "pattern": "("}, {"enum": ["x" * 100_000]},
    ],
)  # fmt: skip
def test_a_schema_that_no_text_can_follow_is_refused_in_one_line(schema):
    with pytest.raises(Refusal, match="response_format") as caught:
        Grammars(BYTES).of_json(schema, "response_format")
    assert caught.value.status == 400
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [-1] * 10_000}),
        (CompletionRequest, {"prompt": [[1.5]] * 256}),
        (CompletionRequest, {"prompt": [[-1] * 1000] * 256}),
        (CompletionRequest, {"stop_ids": ["a"] * 10_000}),
        (EmbeddingsRequest, {"input": [{}] * 10_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 4000}]}),
        (ResponsesRequest, {"input": [{"role": "user", "content": [{}] * 4000}]}),
        (DetokenizeRequest, {"ids": [None] * 10_000}),
    ],
)
def test_of_a_long_list_that_is_wrong_the_first_errors_are_enough(kind, body):
    with pytest.raises(ValidationError) as caught:  # a million of them would hold up every stream for seconds
        kind.model_validate(body)
    assert caught.value.error_count() < 8


def test_a_tokenizer_of_numbers_has_no_json():
    with pytest.raises(Refusal, match="no bytes of text"):
        Grammars(tokenizer.load("integers:9")).of_json(None, "response_format")
