"""The client that applications use, from PyPI, against the server."""

from __future__ import annotations

import json

import openai
import pytest

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "is_dark": {"type": "boolean"}},
    "required": ["colour", "is_dark"],
    "additionalProperties": False,
}
PAINT = {"name": "paint", "description": "paints a wall", "parameters": SCHEMA}


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_chat_is_answered(client):
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=6, seed=1)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    usage = answer.usage
    assert usage.prompt_tokens == len("User: hello\n\nAssistant:")
    assert (usage.completion_tokens, usage.total_tokens) == (6, usage.prompt_tokens + 6)


def test_a_stream_says_what_the_whole_answer_says(client):
    asked = dict(model="tiny", messages=HELLO, max_tokens=20, seed=3)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 20


def test_several_answers_are_those_of_seeds_that_count_up(client):
    asked = dict(model="tiny", messages=HELLO, max_tokens=8, temperature=1, top_p=1)
    three = client.chat.completions.create(**asked, n=3, seed=5)
    alone = [client.chat.completions.create(**asked, seed=seed) for seed in (5, 6, 7)]
    texts = [choice.message.content for choice in three.choices]
    assert texts == [one.choices[0].message.content for one in alone]
    assert len(set(texts)) == 3
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**asked, n=3, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts


def test_log_probabilities_come_with_the_likeliest_tokens(client):
    asked = dict(model="tiny", messages=HELLO, max_tokens=5, seed=1, logprobs=True, top_logprobs=3)
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(whole) == 5
    for token in whole:
        tops = [other.logprob for other in token.top_logprobs]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        assert token.logprob <= tops[0] <= 0
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token
    streamed = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert [token.bytes for token in streamed] == [token.bytes for token in whole]


def test_a_bias_bars_and_forces_tokens(client):
    forced = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, logit_bias={str(ord("x")): 100}, presence_penalty=0,
        frequency_penalty=0,
    )  # fmt: skip
    assert forced.choices[0].message.content == "xxxx"


def test_a_penalty_below_zero_has_tokens_come_again(client):
    asked = dict(model="tiny", messages=HELLO, max_tokens=12, temperature=1, top_p=1, seed=2)
    answers = [
        client.chat.completions.create(**asked, presence_penalty=penalty, frequency_penalty=penalty)
        for penalty in (-50, 50)
    ]
    again, others = (answer.choices[0].message.content for answer in answers)
    assert len(set(again)) == 1
    assert len(set(others)) > 6


def test_a_stop_text_ends_an_answer_and_is_not_in_it(client):
    bias = {str(ord("x")): 100}
    answer = client.completions.create(model="tiny", prompt="a", max_tokens=9, logit_bias=bias, stop=["xxxx"])
    assert answer.choices[0].text == ""
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 4


def test_a_schema_is_followed(client):
    shape = {"type": "json_schema", "json_schema": {"name": "paint", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=300, seed=seed, response_format=shape
        )
        value = json.loads(answer.choices[0].message.content)
        assert value.keys() == {"colour", "is_dark"}
        assert value["colour"] in ("red", "blue")
        assert answer.choices[0].finish_reason == "stop"


def test_a_tool_is_called(client):
    tools = [{"type": "function", "function": PAINT}]
    asked = dict(model="tiny", messages=HELLO, max_tokens=400, seed=1, tools=tools, tool_choice="required")
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["colour"] in ("red", "blue")
    results = [
        *HELLO, {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": '{"done": true}'},
    ]  # fmt: skip
    assert client.chat.completions.create(model="tiny", messages=results, tools=tools, max_tokens=3, seed=1).choices
    streamed = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    [delta] = [one.delta.tool_calls[0] for one in streamed if one.delta.tool_calls]
    assert (delta.function.name, delta.function.arguments) == ("paint", call.function.arguments)
    assert streamed[-1].finish_reason == "tool_calls"


def test_completions_continue_several_prompts(client):
    answer = client.completions.create(
        model="tiny", prompt=["a", "bc"], max_tokens=3, n=2, seed=1, logprobs=2, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:1] for choice in answer.choices] == list("aabb")
    assert all(len(choice.logprobs.tokens) == 3 for choice in answer.choices)
    assert answer.usage.prompt_tokens == 3
    ids = client.completions.create(model="tiny", prompt=[ord("a")], max_tokens=3, seed=1)
    assert ids.choices[0].text == answer.choices[0].text[1:]
    streamed = client.completions.create(model="tiny", prompt="a", max_tokens=3, seed=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == ids.choices[0].text


def test_a_response_goes_on_from_the_one_before(client):
    first = client.responses.create(model="tiny", input="hello", max_output_tokens=4)
    assert first.status == "incomplete"
    assert first.output_text == first.output[0].content[0].text
    second = client.responses.create(
        model="tiny", input="and?", max_output_tokens=4, previous_response_id=first.id, extra_body={"seed": 1}
    )
    whole = [
        {"role": "user", "content": "hello"}, {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "and?"},
    ]  # fmt: skip
    same = client.responses.create(model="tiny", input=whole, max_output_tokens=4, extra_body={"seed": 1})
    assert second.usage.input_tokens == same.usage.input_tokens
    assert second.output_text == same.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="in the server's memory alone.* Send all messages") as refused:
        client.responses.create(model="tiny", input="and?", previous_response_id=first.id)
    assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")
    assert first.id in str(refused.value)


def test_a_response_is_streamed(client):
    bias = {"text": {"format": {"type": "json_schema", "name": "paint", "schema": SCHEMA}}}
    with client.responses.stream(model="tiny", input="hello", max_output_tokens=300, extra_body=bias) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert json.loads(text) == json.loads(final.output_text)
    assert final.status == "completed"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_response_is_shown_again_until_it_is_forgotten(client, is_streamed):
    asked = dict(model="tiny", input="hello", max_output_tokens=6)
    answer = client.responses.create(**asked, stream=is_streamed)
    answer = list(answer)[-1].response if is_streamed else answer
    assert client.responses.retrieve(answer.id) == answer
    client.responses.delete(answer.id)
    unkept = client.responses.create(**asked, store=False)
    for one in (answer, unkept):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(one.id)


def test_a_response_calls_a_tool(client):
    tools = [{"type": "function", **PAINT}]
    answer = client.responses.create(
        model="tiny", input="hello", max_output_tokens=400, tools=tools, tool_choice="required"
    )
    [call] = answer.output
    assert (call.type, call.name) == ("function_call", "paint")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    after = client.responses.create(
        model="tiny", input=[result], previous_response_id=answer.id, max_output_tokens=3, tools=tools
    )
    assert after.output


def test_embeddings_have_length_one_and_both_forms(client):
    plain = client.embeddings.create(model="tiny", input=["hello", "hello there"], encoding_format="float")
    packed = client.embeddings.create(model="tiny", input="hello there")  # base64, which the client unpacks
    assert len(plain.data) == 2
    for one in plain.data:
        assert sum(number**2 for number in one.embedding) == pytest.approx(1, abs=1e-5)
    assert packed.data[0].embedding == pytest.approx(plain.data[1].embedding, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "tini"}, openai.NotFoundError, "Did you mean 'tiny'"),
        ({"model": "gpt-4"}, openai.NotFoundError, "there is no model 'gpt-4'; this server has tiny."),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"top_p": 2}, openai.BadRequestError, "top_p"),
        ({"max_tokens": 10**9}, openai.BadRequestError, "max_tokens"),
        ({"stop": [""]}, openai.BadRequestError, "stop"),
        ({"logit_bias": {"999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias"),
        ({"seed": -1}, openai.BadRequestError, "seed"),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "Unrecognized request argument supplied: colour"),
        ({"extra_body": {"state": "nowhere"}}, openai.NotFoundError, "nowhere"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tools"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}},
            openai.BadRequestError,
            "response_format",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
            openai.BadRequestError,
            "messages",
        ),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, None, ""),  # the template leaves control characters out
        (
            {"messages": [*HELLO, {"role": "assistant", "content": "a\n\nUser: b"}, *HELLO]},
            openai.BadRequestError,
            "would end the turn",
        ),
    ],
)
def test_what_cannot_be_served_is_told(client, changes, error, words):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 2, **changes}
    if error is None:
        assert client.chat.completions.create(**asked).choices
        return
    with pytest.raises(error, match=words) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.body["type"]


def test_a_wrong_key_is_refused(serve, engine_of):
    address = serve(engine_of(1), api_key="right")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        client.api_key = "right"
        assert client.models.list().data


def test_one_request_too_many_is_told_to_wait(serve, engine_of):
    address = serve(engine_of(1), queue=0)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        asked = dict(model="tiny", prompt="a", max_tokens=20_000, logit_bias={"0": -100})
        stream = client.completions.create(**asked, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="a", max_tokens=1)
        assert caught.value.response.headers["retry-after"] == "1"
        stream.close()
