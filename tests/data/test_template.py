"""The chat template: upstream's text for turns, thoughts and tools, and which of it the model writes."""

from __future__ import annotations

import pytest

from heron.checkpoint import vocabulary
from heron.data import template
from heron.data.template import Message, RwkvTemplate
from heron.errors import ConfigError

TALK = (
    Message("system", " Be\r\n\n kind. "),
    Message("user", "hello\n\n\nthere"),
    Message("assistant", "Hi!\n\nWell? "),
    Message("user", "fine"),
    Message("assistant", "Good."),
)
GET = {"name": "get", "description": "Fetches it.", "parameters": {"type": "object"}}
CALL = {"name": "get", "arguments": {"id": 3}}
TOOLS = (
    Message("user", "What is it?"),
    Message("assistant", "", reasoning="I look.", tool_calls=(CALL,)),
    Message("tool", '{"it": "a heron"}'),
    Message("assistant", "A heron."),
)
JINJA = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def marked(spans):
    """The text, with what is written by an assistant in brackets."""
    return "".join(f"[{span.text}]" if span.written else span.text for span in spans)


def written(spans, messages):
    """The same for answers alone."""
    answers = [span._replace(written=span.written and messages[span.message].role == "assistant") for span in spans]
    return marked(answers)


def test_turns_are_upstream_s_and_an_answer_ends_where_the_next_turn_opens():
    assert written(RwkvTemplate().spans(TALK), TALK) == (
        "System: Be\n kind.\n\nUser: hello\nthere\n\nAssistant:[ Hi!\n\nWell?\n\nUser:] fine\n\nAssistant:[ Good.\n\n]"
    )
    assert written(RwkvTemplate().spans(TALK, closed=True), TALK).endswith("Assistant:[ Good.\n\nUser:]")
    assert template.STOP == "\n\nUser:"


def test_every_message_but_its_marker_is_written_by_its_author():
    spans = RwkvTemplate().spans(TALK)
    assert marked(spans[:4]) == "System:[ Be\n kind.\n\n]User:[ hello\nthere\n\n]"
    assert [span.message for span in spans] == [0, 0, 1, 1, 2, 2, 3, 4, 4]


def test_tools_have_the_form_in_which_the_released_models_call_them():
    assert written(RwkvTemplate().spans(TOOLS, [GET]), TOOLS) == (
        "### System\n### `get`\n**Description:** Fetches it.\n**Parameters:**\n```json\n"
        '{\n  "type": "object"\n}\n```\n### User\nWhat is it?\n### Assistant\n'
        "[<think>\nI look.\n</think>\n**Tool Call:**\n"
        '```json\n{\n  "name": "get",\n  "arguments": {\n    "id": 3\n  }\n}\n```'
        '\n### Tool Output\n]```json\n{"it": "a heron"}\n```\n### Assistant\n[A heron.\n]'
    )
    with_system = RwkvTemplate().spans((Message("system", "Short."), *TOOLS), [GET])
    assert "".join(span.text for span in with_system).startswith("### System\nShort.\n\n### `get`\n")


def test_control_characters_are_left_out():
    spans = RwkvTemplate().spans((Message("user", "a\x1b[0m\u202eb\tc"), Message("assistant", "d\x00\u200b e")))
    assert [spans[1].text, spans[3].text] == [" a[0mb\tc\n\n", " d\u200b e\n\n"]


def test_a_thought_stands_before_the_answer():
    spans = RwkvTemplate().spans((Message("user", "a"), Message("assistant", "b", reasoning="hm")))
    assert marked(spans[2:]) == "Assistant:[ <think>\nhm\n</think>\nb\n\n]"


@pytest.mark.parametrize(
    ("think", "end"),
    [
        ("", "User: a\n\nAssistant:"),
        ("on", "User: a\n\nAssistant: <think"),
        ("off", "User: a\n\nAssistant: <think>\n</think"),
        ("short", "User: a (think a bit)\n\nAssistant: <think"),
        ("long", "User: a (think a lot)\n\nAssistant: <think"),
    ],
)
def test_the_prompt_of_an_answer_is_what_stands_before_it_in_training(think, end):
    assert RwkvTemplate().prompt([Message("user", " a ")], think=think) == end


def test_an_answer_that_would_end_the_turn_is_refused():
    for text in ("so\n\nUser: x", "so\n\nAssistant: y"):
        with pytest.raises(ValueError, match=r"messages\[1\].content: wanted an answer without"):
            RwkvTemplate().spans((Message("user", "a"), Message("assistant", text)))
    with pytest.raises(ValueError, match="### User"):
        RwkvTemplate().spans((*TOOLS[:3], Message("assistant", "see\n### User\n")), [GET])


def test_exported_models_carry_the_same_template(jinja):
    text = "".join(span.text for span in RwkvTemplate().spans(TALK))
    assert "".join(span.text for span in jinja(vocabulary.CHAT_TEMPLATE).spans(TALK)) == text


# -- Jinja ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def jinja(tmp_path):
    def load(source):
        path = tmp_path / "t.jinja"
        path.write_text(source)
        return template.load(str(path))

    return load


def test_a_jinja_template_s_answers_are_found_by_what_it_makes_of_the_beginning(jinja):
    spans = jinja(JINJA).spans(TALK[1:])
    assert written(spans, TALK[1:]) == (
        "<user>hello\n\n\nthere<assistant>[Hi!\n\nWell? </s>]<user>fine<assistant>[Good.</s>]"
    )
    asked = jinja(JINJA).spans((*TALK[1:], Message("user", "and?")))
    assert asked[-1] == ("<user>and?", 4, True)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('no tools') }}", "no tools"),
        ("{{ messages[0].nothing.there }}", "UndefinedError"),
        ("{{ messages.append(3) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages[-1].content }}", "another text of the conversation"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}", "another text"),
    ],
)
def test_a_jinja_template_that_fails_or_looks_ahead_is_refused(jinja, source, words):
    with pytest.raises(ValueError, match=words):
        jinja(source).spans(TALK)


def test_a_file_that_is_no_template_is_refused_by_its_line(jinja, tmp_path):
    with pytest.raises(ConfigError, match="t.jinja, line 2"):
        jinja("a\n{% if %}")
    with pytest.raises(ConfigError, match="no.jinja: No such file"):
        template.load(str(tmp_path / "no.jinja"))
