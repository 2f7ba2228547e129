"""Conversations from rows of any form: which ids are learned, what is cut, and what is refused by line and field."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from heron import tokenizer
from heron.data import conversations, template
from heron.data.template import RwkvTemplate
from heron.errors import ConfigError, DataError
from tests.tokenizer.tokenizer_kinds import KEEP_ALL, load

LETTERS = tokenizer.load("bytes")
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Yes."}
TALK = {"messages": [USER, ANSWER]}


@pytest.fixture
def read(tmp_path):
    def read_(*rows, ctx_len=512, text_tokenizer=LETTERS, chat_template=None, val_fraction=0.0, **settings):
        path = tmp_path / "chat.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        chat_template = chat_template or RwkvTemplate()
        return conversations.load(
            str(path), text_tokenizer, ctx_len, chat_template, val_fraction=val_fraction, **settings
        )

    return read_


def marked(sample, text_tokenizer=LETTERS):
    """The text of a sample with what is learned in brackets and the end of a document as a bar."""
    parts, before = [], False
    for token, learned in zip(sample.ids, sample.learned, strict=True):
        if learned != before:
            parts.append("[" if learned else "]")
        before = learned
        parts.append("|" if token == text_tokenizer.eod else token)
    text, run = "", []
    for part in [*parts, "]" if before else ""]:
        if isinstance(part, str):
            text, run = text + text_tokenizer.decode(run) + part, []
        else:
            run.append(int(part))
    return text


FORMS = {
    "messages": (TALK, "User: hi\n\nAssistant:[ Yes.\n\n|]"),
    "content parts": (
        {"messages": [USER, {**ANSWER, "content": [{"type": "text", "text": "Y"}, {"type": "text", "text": "o"}]}]},
        "User: hi\n\nAssistant:[ Yo\n\n|]",
    ),
    "prompt and completion": ({"prompt": "The sky is", "completion": " blue."}, "The sky is[ blue.|]"),
    "lists of them": ({"prompt": [USER], "completion": [ANSWER]}, "User: hi\n\nAssistant:[ Yes.\n\n|]"),
    "text": ({"text": "All of it."}, "[All of it.|]"),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": None},
        "User: Add.\n1 2\n\nAssistant:[ 3\n\n|]",
    ),
    "ShareGPT": (
        {"system": "Be.", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Yes."}]},
        "System: Be.\n\nUser: hi\n\nAssistant:[ Yes.\n\n|]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_known_by_its_keys(read, form):
    row, want = FORMS[form]
    assert marked(read(row).samples[0]) == want


def test_what_was_read_is_said_in_one_line(read):
    said = []
    read(TALK, TALK, {"text": "ab"}, say=said.append)
    assert said == ["chat.jsonl: 3 rows (messages: 2, text: 1), 59 tokens, of which 18 are learned"]


def test_tools_are_read_in_openai_s_form_and_bare(read):
    function = {"name": "get", "description": "d", "parameters": {}}
    for call in ({"type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}},
                 {"name": "get", "arguments": {"a": 1}}):  # fmt: skip
        for tools in ([{"type": "function", "function": function}], [function], json.dumps([function])):
            turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
                     {"role": "tool", "content": "3"}, ANSWER]  # fmt: skip
            text = marked(read({"messages": turns, "tools": tools}).samples[0])
            assert '### Assistant\n[**Tool Call:**\n```json\n{\n  "name": "get",\n  "arguments": {\n    "a": 1' in text
            assert text.endswith("\n```\n### Tool Output\n]```json\n3\n```\n### Assistant\n[Yes.\n|]")
    turns = [{"from": "human", "value": "hi"}, {"from": "function_call", "value": '{"name": "get"}'},
             {"from": "observation", "value": "3"}, {"from": "gpt", "value": "Yes."}]  # fmt: skip
    assert '"name": "get"' in marked(read({"conversations": turns}).samples[0])


def test_what_is_learned_is_said_by_the_run_and_by_single_messages(read):
    turns = [{**USER, "weight": 1}, {**ANSWER, "weight": 0}, USER, ANSWER]
    of_run = marked(read({"messages": turns}).samples[0])
    assert of_run == "User:[ hi\n\n]Assistant: Yes.\n\nUser: hi\n\nAssistant:[ Yes.\n\n|]"
    assert marked(read({"messages": [USER, ANSWER]}, loss="all").samples[0]) == "[User: hi\n\nAssistant: Yes.\n\n|]"
    weighed = read({"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]}, loss="all").samples[0]
    assert marked(weighed) == "[User: hi\n\n]Assistant: Yes.\n\nUser:[ hi\n\nAssistant: Yes.\n\n|]"


@pytest.mark.parametrize("kind", KEEP_ALL)
def test_ids_are_those_of_the_whole_text_and_the_answer_is_learned_in_every_vocabulary(read, kind):
    chosen = load(kind)
    turns = [
        USER,
        {"role": "assistant", "content": "the heron\n\nwaits é"},
        USER,
        {"role": "assistant", "content": "it is"},
    ]
    sample = read({"messages": turns}, text_tokenizer=chosen).samples[0]
    text = "User: hi\n\nAssistant: the heron\n\nwaits é\n\nUser: hi\n\nAssistant: it is\n\n"
    if chosen.eod is None:
        text += "User:"
    ids = sample.ids.tolist()
    assert chosen.encode(text) == (ids if chosen.eod is None else ids[:-1])
    assert chosen.eod is None or ids[-1] == chosen.eod
    runs = re.findall(r"\[([^]]*)\]", marked(sample, chosen))
    assert [run.strip() for run in runs[:1]] == ["the heron\n\nwaits é\n\nUser:"]
    assert runs[1].strip("| \n").startswith("it is")
    assert len(runs) == 2


def test_long_conversations_are_cut_between_messages_and_counted(read):
    turns = [USER, ANSWER, USER, ANSWER, USER, {"role": "assistant", "content": "x" * 80}]
    whole = "User: hi\n\nAssistant:[ Yes.\n\nUser:] hi\n\nAssistant:[ Yes.\n\n|]"
    said = []
    samples = read({"messages": turns}, TALK, {"messages": turns[4:]}, ctx_len=63, say=said.append).samples
    assert [marked(sample) for sample in (samples[0], samples[1])] == [whole, FORMS["messages"][1]]
    assert len(samples) == 2
    assert said[-1] == (
        "chat.jsonl: longer than ctx_len 63: 1 cut behind the last answer that fits; "
        "1 left out, since nothing up to the first answer's end fits"
    )
    assert len(read({"messages": turns[:4]}, ctx_len=len(whole) - 5).samples[0].ids) == len(whole) - 4
    assert marked(read({"messages": turns[:4]}, ctx_len=len(whole) - 6).samples[0]) == FORMS["messages"][1]
    with pytest.raises(DataError, match="fits ctx_len 20; raise it"):
        read(TALK, ctx_len=20)


def test_a_long_text_is_cut_anywhere_and_every_token_is_learned_once(read):
    said = []
    samples = read({"text": "0123456789" * 3}, ctx_len=8, say=said.append).samples
    targets = np.concatenate([samples[i].ids[1:] for i in range(len(samples))])
    assert targets.tolist() == [*b"123456789" + b"0123456789" * 2, 0]
    assert all(samples[i].learned[1:].all() for i in range(len(samples)))
    assert said[-1].endswith("1 texts cut into several samples")


def test_validation_is_the_last_conversations_whole(read):
    rows = [{"text": f"{n}" * 30} for n in range(10)]
    found = read(*rows, val_fraction=None, ctx_len=8)
    assert {bytes(found.val_samples[i].ids[:1].astype(np.uint8)) for i in range(len(found.val_samples))} == {b"9"}
    assert len(found.samples) == 9 * len(found.val_samples)
    assert found.prompt.tolist() == [57]
    assert read(*rows[:9], val_fraction=None).val_samples is None
    with pytest.raises(DataError, match="val_fraction 0.01 of 10 conversations is none"):
        read(*rows, val_fraction=0.01)


def test_the_fingerprint_knows_texts_and_masks(read):
    assert read(TALK).fingerprint == read(TALK).fingerprint
    others = [read(TALK, loss="all"), read(TALK, TALK), read({"messages": [USER, {**ANSWER, "content": "No."}]})]
    assert len({found.fingerprint for found in [read(TALK), *others]}) == 4


BAD = {
    "user after user": ({"messages": [USER, USER, ANSWER]}, "messages[1].role: roles out of order: user behind user"),
    "answer first": ({"messages": [ANSWER]}, "messages[0].role: roles out of order: assistant at the beginning"),
    "system later": ({"messages": [USER, {"role": "system", "content": "x"}]}, "messages[1].role"),
    "unknown role": ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0].role: wanted system, user"),
    "unknown from": ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from: wanted human"),
    "empty answer": ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "messages[1].content: the answer"),
    "empty output": ({"instruction": "a", "output": " "}, "output: the answer is empty"),
    "empty completion": ({"prompt": "a", "completion": ""}, "completion: the answer is empty"),
    "empty question": ({"messages": [{"role": "user", "content": ""}, ANSWER]}, "messages[0].content: is empty"),
    "no answer": ({"messages": [USER]}, "nothing of it is learned"),
    "weight 0": ({"messages": [USER, {**ANSWER, "weight": 0}]}, "nothing of it is learned"),
    "weight half": ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "messages[1].weight: wanted 0 or 1"),
    "no messages": ({"messages": []}, "messages: wanted a list of at least one"),
    "a message that is text": ({"messages": ["hi"]}, "messages[0]: wanted an object"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content: wanted"),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: wanted a string"),
    "half a pair": ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content: character 0"),
    "calls": ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "messages[1].tool_calls[0]"),
    "arguments": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
        "messages[1].tool_calls[0].arguments: wanted JSON",
    ),
    "a user's call": ({"messages": [{**USER, "tool_calls": [{"name": "f"}]}]}, "messages[0].tool_calls"),
    "tools": ({**TALK, "tools": [{"type": "function"}]}, "tools[0]: wanted a function with its name"),
    "an end inside": ({"messages": [USER, {**ANSWER, "content": "a\n\nUser: b"}]}, "messages[1].content: wanted"),
    "NUL under bytes": ({"text": "a\0b"}, "NUL"),
    "other keys": ({"question": "a", "answer": "b"}, "got 'question', 'answer'"),
    "empty text": ({"text": ""}, "text: is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused_by_line_and_field(read, name):
    row, words = BAD[name]
    with pytest.raises(DataError, match=re.escape(words)) as refusal:
        read(TALK, row)
    assert "chat.jsonl, line 2" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_template_that_fails_is_told_with_its_line(read, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% if messages | length > 2 %}{{ raise_exception('two turns only') }}{% endif %}a"
    )
    with pytest.raises(DataError, match=r"chat.jsonl, line 2: the template .*t.jinja failed: .*two turns only"):
        read(
            {"text": "a"},
            {"messages": [USER, ANSWER, USER, ANSWER]},
            chat_template=template.load(str(tmp_path / "t.jinja")),
        )
    with pytest.raises(DataError, match="the template leaves no text of what is learned"):
        read(TALK, chat_template=template.load(str(tmp_path / "t.jinja")))


def test_no_file_and_no_rows_are_refused(read, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        conversations.load(str(tmp_path / "no.jsonl"), LETTERS, 8, RwkvTemplate())
    with pytest.raises(DataError, match="holds no conversation"):
        read()


@pytest.mark.parametrize("kind", ["integers:9", "word piece", "unigram"])
def test_a_tokenizer_that_cannot_hold_the_markers_is_refused(read, kind):
    with pytest.raises(ConfigError, match="has numbers only|can't hold the template"):
        read(TALK, text_tokenizer=load(kind))
