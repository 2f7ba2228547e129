"""What the server remembers: prefixes that are read once, sessions, saved states, and variants of the model."""

from __future__ import annotations

import httpx
import pytest
import torch

from heron import tokenizer
from heron.config.finetune_adapter import AdapterConfig
from heron.data import template
from heron.generation import Engine, Request, Sampling, Snapshot
from heron.model import State
from heron.model.adapters import add_adapter
from tests.serve.running import running

READABLE = {str(token): -100 for token in range(256) if not 97 <= token <= 122}  # so that every answer is small letters
HTTP = httpx.Client(timeout=60)  # one for all: each of its own would read all certificates
FIXED = {"seed": 1, "max_tokens": 8, "logit_bias": READABLE}


def chat(address, messages, **more):
    answer = HTTP.post(f"{address}/v1/chat/completions", json={"messages": messages, **FIXED, **more}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(answer):
    return answer["choices"][0]["message"]["content"]


def user(text):
    return {"role": "user", "content": text}


def grown(address, turns, **more):
    """A conversation in which each turn sends all of the text again, and the last answer."""
    messages, answer = [], None
    for turn in range(turns):
        messages.append(user(f"question {turn}, which is a bit longer than the answer to it"))
        answer = chat(address, messages, **more)
        messages.append({"role": "assistant", "content": said(answer)})
    return messages, answer


def test_a_chat_of_20_turns_is_read_once(serve, engine_of, tmp_path):
    # This model writes no space in front of an answer, as the usual template has it and models trained on it write.
    (tmp_path / "plain.jinja").write_text(
        "{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    address = serve(engine_of(2), template=template.load(str(tmp_path / "plain.jinja")))
    messages, answer = grown(address, 20)
    usage = answer["usage"]
    n_cached = usage["prompt_tokens_details"]["cached_tokens"]
    n_new = 1 + len(f"<user>{messages[-2]['content']}<assistant>")  # the last token drawn was not read yet
    assert usage["prompt_tokens"] - n_cached == n_new
    assert n_cached >= 0.95 * usage["prompt_tokens"]


def test_what_is_cached_changes_no_answer(serve, engine_of):
    with_cache, without = serve(engine_of(2)), serve(engine_of(2), cache_device=0, cache_host=0)
    messages, last = grown(with_cache, 4)
    again, other = grown(without, 4)
    assert messages == again
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_session_is_saved_listed_forked_begun_from_and_deleted(serve, engine_of):
    address = serve(engine_of(2))
    messages, _ = grown(address, 2, session_id="talk")
    saved = HTTP.post(f"{address}/v1/states", json={"name": "expert", "session_id": "talk"})
    assert saved.json() == {"id": "expert", "object": "state"}
    HTTP.post(f"{address}/v1/states", json={"name": "copy", "fork": "expert"}).raise_for_status()
    assert [one["id"] for one in HTTP.get(f"{address}/v1/states").json()["data"]] == ["copy", "expert"]

    whole = said(chat(address, [*messages, user("well?")]))
    for more in ({"state": "expert"}, {"state": "copy"}):
        assert said(chat(address, [user("well?")], **more)) == whole
    HTTP.post(f"{address}/v1/states/expert/load", json={"session_id": "other"}).raise_for_status()
    assert said(chat(address, [user("well?")], session_id="other")) == whole
    assert said(chat(address, [user("well?")])) != whole

    assert HTTP.delete(f"{address}/v1/states/expert").json()["deleted"] is True
    assert HTTP.delete(f"{address}/v1/states/expert").status_code == 404
    assert [one["id"] for one in HTTP.get(f"{address}/v1/states").json()["data"]] == ["copy"]


def test_of_several_answers_that_are_streamed_the_first_one_is_the_sessions(serve, engine_of):
    address = serve(engine_of(2))
    asked = {"messages": [user("hello")], **FIXED, "max_tokens": 40, "n": 2, "temperature": 1, "top_p": 1}
    chat(address, **asked, session_id="whole")
    body = {**asked, "session_id": "streamed", "stream": True}
    assert HTTP.post(f"{address}/v1/chat/completions", json=body, timeout=60).text.endswith("[DONE]\n\n")
    answers = []
    for name in ("whole", "streamed"):
        HTTP.post(f"{address}/v1/states", json={"name": name, "session_id": name}).raise_for_status()
        answer = chat(address, [user("well?")], state=name, logprobs=True)
        answers.append([token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]])
    assert answers[0] == answers[1]


def test_what_several_texts_of_one_prompt_save_is_counted_once(serve, engine_of):
    address = serve(engine_of(4))
    asked = {"prompt": "abcdefgh", **FIXED, "session_id": "text"}
    first = HTTP.post(f"{address}/v1/completions", json=asked).json()["choices"][0]["text"]
    asked = {"prompt": f"abcdefgh{first}, and on", **FIXED, "n": 3}
    usage = HTTP.post(f"{address}/v1/completions", json=asked).json()["usage"]
    n_read = len("abcdefgh") + 7  # the last token drawn was not read
    assert usage["prompt_tokens_details"]["cached_tokens"] == n_read < usage["prompt_tokens"]


def test_a_state_saved_anew_takes_the_place_of_the_older_one_in_the_cache_too(serve, engine_of):
    address = serve(engine_of(2))
    answers = []
    for text in ("one", "two"):
        chat(address, [user(text)], session_id="talk")
        HTTP.post(f"{address}/v1/states", json={"name": "now", "session_id": "talk"}).raise_for_status()
        answers.append([said(chat(address, [user("well?")], state="now")) for _ in range(2)])
    assert answers[0][0] == answers[0][1]
    assert answers[1][0] == answers[1][1]
    assert answers[0] != answers[1]


def test_a_plain_text_is_a_session_too(serve, engine_of):
    address = serve(engine_of(2))
    asked = {"prompt": "abc", **FIXED, "session_id": "text"}
    first = HTTP.post(f"{address}/v1/completions", json=asked).json()["choices"][0]["text"]
    HTTP.post(f"{address}/v1/states", json={"name": "there", "session_id": "text"}).raise_for_status()
    asked = {"prompt": "def", **FIXED, "state": "there"}
    on = HTTP.post(f"{address}/v1/completions", json=asked).json()["choices"][0]["text"]
    whole = HTTP.post(f"{address}/v1/completions", json={"prompt": f"abc{first}def", **FIXED}).json()
    assert on == whole["choices"][0]["text"]
    usual = {"top_p": 0.3, "presence_penalty": 0.3, "frequency_penalty": 0.3}
    prompt = f"abc{first}User: well?\n\nAssistant:"
    whole = HTTP.post(f"{address}/v1/completions", json={"prompt": prompt, **FIXED, **usual}).json()
    assert said(chat(address, [user("well?")], state="there")) == whole["choices"][0]["text"]


def test_states_in_a_folder_outlive_the_server(engine_of, tmp_path):
    with running(engine_of(2), state_dir=str(tmp_path)) as address:
        messages, _ = grown(address, 1, session_id="talk")
        HTTP.post(f"{address}/v1/states", json={"name": "kept", "session_id": "talk"}).raise_for_status()
        whole = said(chat(address, [*messages, user("well?")]))
    with running(engine_of(2), state_dir=str(tmp_path)) as address:
        assert said(chat(address, [user("well?")], state="kept")) == whole


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "a", "session_id": "nobody"}, 404),
        ({"name": "a", "response_id": "resp_0"}, 404),
        ({"name": "a", "fork": "nothing"}, 404),
        ({"name": "a"}, 400),
        ({"name": "a", "fork": "a", "session_id": "b"}, 400),
    ],
)
def test_what_cannot_become_a_state_is_told(http, body, status):
    assert http.post("/v1/states", json=body).status_code == status


def test_a_response_can_be_saved(http):
    body = {"input": "hello", "seed": 1, "max_output_tokens": 4}
    answer = http.post("/v1/responses", json=body).json()
    saved = http.post("/v1/states", json={"name": "answered", "response_id": answer["id"]})
    assert saved.status_code == 200


# -- variants ---------------------------------------------------------------------------------------------------------


def tuned(model, seed):
    state = State.zeros(model.config, 1, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for layer in state.layers:
        layer.wkv.normal_(0, 1, generator=generator)
    return state


def test_tuned_states_and_adapters_are_chosen_by_a_request(serve, random_model):
    def model():
        return random_model(vocab_size=256)

    adapted = model()
    adapter = add_adapter(adapted, AdapterConfig(rank=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    adapter.merge()
    base, law = (Engine(one, tokenizer.load("bytes"), 4) for one in (model(), adapted))
    states = {"poet": tuned(base.model, 1), "clerk": tuned(base.model, 2)}
    address = serve(base, {"law": law}, states)
    names = ["tiny", "tiny:law", "tiny:poet", "tiny:clerk"]
    assert [one["id"] for one in HTTP.get(f"{address}/v1/models").json()["data"]] == names

    sampling, bias = Sampling(), {token: -100 for token in range(256) if not 97 <= token <= 122}
    alone = [
        "".join(Engine(which, tokenizer.load("bytes")).stream(
            Request("abc", 8, sampling, seed=1, logit_bias=bias, after=state and Snapshot(state))
        ))
        for which, state in (
            (model(), None), (adapted, None), (base.model, states["poet"]), (base.model, states["clerk"])
        )
    ]  # fmt: skip
    got = [
        HTTP.post(f"{address}/v1/completions", json={"model": name, "prompt": "abc", **FIXED}).json() for name in names
    ]
    assert [one["choices"][0]["text"] for one in got] == alone
    assert len(set(alone)) == 4
    assert [one["model"] for one in got] == names


def test_a_state_fits_the_weights_that_made_it_alone(serve, random_model):
    base, other = (Engine(random_model(seed, vocab_size=256), tokenizer.load("bytes"), 2) for seed in (0, 1))
    address = serve(base, {"other": other})
    chat(address, [user("hello")], session_id="talk")
    HTTP.post(f"{address}/v1/states", json={"name": "mine", "session_id": "talk"}).raise_for_status()
    body = {"model": "tiny:other", "messages": [user("well?")], "state": "mine"}
    refused = HTTP.post(f"{address}/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert "another model" in refused.json()["error"]["message"]
    assert "/" not in refused.json()["error"]["message"]


def test_two_variants_need_two_names(engine_of):
    with pytest.raises(Exception, match="two variants"):  # noqa: SIM117
        with running(engine_of(1), {"a": engine_of(1)}, {"a": tuned(engine_of(1).model, 0)}):
            pass
