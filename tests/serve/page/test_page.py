"""The page of `heron serve` in a browser: what someone who talks to a model does there."""

from __future__ import annotations

import json
import re

import pytest

LONG = "word " * 60 + "w" * 300 + "\n\n```\n" + "x = 1; " * 60 + "\n```\n"


def say(tab, text, wait=True):
    tab.fill("#message", text)
    tab.press("#message", "Enter")
    if wait:
        tab.wait_for_selector("#send:visible")


def shown(tab):
    """What the messages say, first to last."""
    return [one.inner_text() for one in tab.query_selector_all("article > .text")]


def act(tab, name, message=-1):
    """Press a button below one of the messages that have it."""
    tab.query_selector_all(f"article [data-action='{name}']")[message].click()


def sent(server):
    """The messages of the last request, as (role, content)."""
    return [(one["role"], one["content"]) for one in server.requests[-1]["messages"]]


def open_settings(tab):
    tab.click("[data-opens=settings]")


def test_a_conversation(tab, server):
    server.script["hello"] = "Good **day**."
    server.pause = 0.06
    say(tab, "hello")
    assert shown(tab) == ["hello", "Good day."]
    assert tab.inner_text("article.assistant strong") == "day"
    assert re.search(r"2 tokens · \d+ tokens/s · first after \d+ ms", tab.inner_text(".assistant .figures"))
    say(tab, "and then?")
    assert sent(server) == [("user", "hello"), ("assistant", "Good **day**."), ("user", "and then?")]
    assert server.requests[-1]["stream"] is True
    title = tab.get_attribute("article:last-child .figures", "title")
    assert title == "Prompt: 5 tokens, 3 of them read before"
    assert "logprobs" not in server.requests[-1]  # they cost time, and nobody asked to see them
    assert tab.inner_text("#conversations [aria-current]") == "hello"
    assert tab.input_value("#title") == "hello"


def test_esc_stops_an_answer_and_keeps_what_was_written(tab, server):
    server.endless.add("go on")
    say(tab, "go on", wait=False)
    tab.wait_for_selector(".assistant .text:has-text('more more')")
    assert tab.get_attribute("article.assistant", "aria-busy") == "true"
    tab.press("#message", "Escape")
    tab.wait_for_selector("#send:visible")
    assert server.left.wait(5)
    assert shown(tab)[1].startswith("You said: go on more more")
    assert tab.inner_text(".assistant .figures").startswith("stopped")
    say(tab, "next")
    assert sent(server)[1][1].startswith("You said: go on more more")


def test_the_stop_button_stops_and_the_conversation_beside_goes_on(tab, server):
    server.endless.update({"one", "two"})
    say(tab, "one", wait=False)
    tab.wait_for_selector("#stop:visible")
    tab.click("#new")
    say(tab, "two", wait=False)
    tab.wait_for_selector("#stop:visible")
    tab.click("#stop")
    tab.wait_for_selector("#send:visible")
    tab.click("#conversations button:has-text('one')")
    tab.wait_for_selector("#stop:visible")
    before = shown(tab)[1]
    tab.wait_for_selector(f".assistant .text:has-text('{before} more more')")
    tab.click("#stop")
    tab.wait_for_selector("#send:visible")


def test_versions_of_an_answer_each_have_their_own_continuation(tab, server):
    server.script["name a bird"] = "A heron."
    say(tab, "name a bird")
    say(tab, "tell me more")
    server.script["name a bird"] = "A stork."
    act(tab, "Retry", 0)
    tab.wait_for_selector("#send:visible")
    assert shown(tab) == ["name a bird", "A stork."]
    assert tab.inner_text(".versions") == "‹\n2 / 2\n›"
    say(tab, "and its legs?")
    assert sent(server)[1] == ("assistant", "A stork.")
    act(tab, "Version before")
    assert shown(tab) == ["name a bird", "A heron.", "tell me more", "You said: tell me more"]
    act(tab, "Version behind")
    assert shown(tab)[1:3] == ["A stork.", "and its legs?"]


def test_an_edited_message_is_a_branch(tab, server):
    say(tab, "one")
    say(tab, "two")
    act(tab, "Edit", 2)
    tab.fill(".edit textarea", "three")
    tab.press(".edit textarea", "Control+Enter")
    tab.wait_for_selector("#send:visible")
    assert shown(tab) == ["one", "You said: one", "three", "You said: three"]
    assert sent(server) == [("user", "one"), ("assistant", "You said: one"), ("user", "three")]
    act(tab, "Version before")
    assert shown(tab)[2:] == ["two", "You said: two"]


def test_an_edited_answer_is_what_the_model_reads_from_then_on(tab, server):
    say(tab, "one")
    act(tab, "Edit")
    tab.fill(".edit textarea", "I said nothing.")
    tab.click(".edit [type=submit]")
    assert len(server.requests) == 1
    say(tab, "two")
    assert sent(server)[1] == ("assistant", "I said nothing.")


def test_an_edit_that_is_cancelled_changes_nothing(tab):
    say(tab, "one")
    act(tab, "Edit", 0)
    tab.fill(".edit textarea", "two")
    tab.press(".edit textarea", "Escape")
    assert shown(tab) == ["one", "You said: one"]
    assert tab.evaluate("document.activeElement.dataset.action") == "Edit"


def test_a_reload_keeps_conversations_branches_and_settings(tab, server):
    say(tab, "one")
    act(tab, "Retry")
    tab.wait_for_selector("#send:visible")
    act(tab, "Version before")
    tab.fill("#title", "My bird")
    tab.press("#title", "Tab")
    open_settings(tab)
    tab.fill("#system", "You are a heron.")
    tab.fill("#temperature", "0.3")
    tab.fill("#seed", "7")
    tab.reload()
    assert shown(tab) == ["one", "You said: one"]
    assert "1 / 2" in tab.inner_text(".versions")
    assert tab.inner_text("#conversations") == "My bird\n✕"
    assert (tab.input_value("#temperature"), tab.input_value("#system")) == ("0.3", "You are a heron.")
    say(tab, "two")
    assert sent(server)[0] == ("system", "You are a heron.")
    assert server.requests[-1]["temperature"] == 0.3


def test_a_reload_in_the_middle_of_an_answer_keeps_its_beginning(tab, server):
    server.endless.add("go on")
    say(tab, "go on", wait=False)
    tab.wait_for_selector(".assistant .text:has-text('more')")
    tab.reload()
    assert shown(tab)[1].startswith("You said: go on more")
    assert tab.inner_text(".assistant .figures").startswith("stopped")
    assert tab.is_visible("#send")


def test_settings_reach_the_server_and_a_seed_counts_up_by_version(tab, server):
    open_settings(tab)
    tab.fill("#top_p", "0.9")
    tab.fill("#max_completion_tokens", "20")
    tab.select_option("#think", "short")
    tab.fill("#seed", "40")
    say(tab, "one")
    wanted = {"top_p": 0.9, "max_completion_tokens": 20, "think": "short", "seed": 40, "temperature": 1}
    assert {name: server.requests[-1][name] for name in wanted} == wanted
    act(tab, "Retry")
    tab.wait_for_selector("#send:visible")
    assert server.requests[-1]["seed"] == 41
    tab.click("#sampling [type=reset]")
    say(tab, "two")
    assert server.requests[-1]["top_p"] == 0.3
    assert not {"seed", "think", "max_completion_tokens"} & server.requests[-1].keys()


def test_a_thought_stands_apart_and_is_not_sent_back(tab, server):
    open_settings(tab)
    tab.select_option("#think", "on")
    say(tab, "one")
    assert tab.text_content(".thought .text") == "Let me see."
    assert shown(tab) == ["one", "You said: one"]
    say(tab, "two")
    assert sent(server)[1] == ("assistant", "You said: one")


def test_the_token_view_shows_ten_likeliest_tokens(tab, server):
    tab.click("#token-view")
    say(tab, "one two three")
    assert server.requests[-1]["top_logprobs"] == 10
    tokens = tab.query_selector_all(".assistant .token")
    assert [token.inner_text() for token in tokens] == ["You", " said:", " one", " two", " three"]
    surprise = [float(token.evaluate("one => one.style.getPropertyValue('--surprise')")) for token in tokens]
    assert surprise[4] > surprise[2] > surprise[0] > 0
    tokens[4].click()
    rows = tab.query_selector_all("#likeliest tr")
    assert len(rows) == 10
    assert tab.inner_text("#likeliest .drawn th") == "␣three"
    assert tab.inner_text("#likeliest .drawn td:last-child") == "6.2 %"
    tab.keyboard.press("ArrowLeft")
    assert tab.inner_text("#likeliest .drawn th") == "␣two"
    tab.keyboard.press("Escape")
    assert not tab.is_visible("#likeliest")
    tab.click("#token-view")
    assert shown(tab) == ["one two three", "You said: one two three"]
    tab.click("#token-view")
    tab.reload()
    assert len(tab.query_selector_all(".assistant .token")) == 5


def test_keyboard_alone(tab, server):
    """No pointer: a message, another answer, an edit, the settings, a new conversation."""

    def focus(selector, key="Tab"):
        for _ in range(80):
            if tab.evaluate("selector => document.activeElement.matches(selector)", selector):
                ring = (
                    "getComputedStyle(document.activeElement.closest('.field') ?? document.activeElement).outlineStyle"
                )
                assert tab.evaluate(ring) != "none", f"{selector} does not show that it has the focus"
                return
            tab.keyboard.press(key)
        raise AssertionError(f"{key} does not reach {selector}")

    focus("#message")
    tab.keyboard.type("first line")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("second line")
    tab.keyboard.press("Control+Enter")
    tab.wait_for_selector("#send:visible")
    assert sent(server) == [("user", "first line\nsecond line")]
    focus("[data-action=Retry]", "Shift+Tab")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".versions")
    tab.wait_for_selector("#send:visible")
    focus("[data-action='Version before']", "Shift+Tab")
    tab.keyboard.press("Enter")
    assert "1 / 2" in tab.inner_text(".versions")
    focus("[data-action=Edit]", "Shift+Tab")
    tab.keyboard.press("Enter")
    tab.keyboard.press("Control+A")
    tab.keyboard.type("third")
    tab.keyboard.press("Control+Enter")
    tab.wait_for_selector("#send:visible")
    assert sent(server) == [("user", "third")]
    focus("[data-opens=settings]", "Shift+Tab")
    tab.keyboard.press("Enter")
    focus("#temperature")
    tab.keyboard.press("ArrowLeft")
    assert tab.input_value("#temperature") == "0.95"
    focus("#settings [data-closes]", "Shift+Tab")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.dataset.opens") == "settings"
    focus("#new", "Shift+Tab")
    tab.keyboard.press("Enter")
    assert shown(tab) == []
    assert tab.evaluate("document.activeElement.id") == "message"


def test_nothing_is_wider_than_a_phone(tab, server):
    tab.set_viewport_size({"width": 360, "height": 640})
    server.script["long"] = LONG
    wide = """[...document.querySelectorAll("body *")].filter((one) => one.getBoundingClientRect().right > 361
        && !one.closest("pre, .hidden")).map((one) => one.outerHTML.slice(0, 80))"""
    assert tab.evaluate(wide) == []
    tab.click("#token-view")
    say(tab, "long")
    for _ in range(2):  # as tokens and as Markdown
        assert tab.evaluate("document.documentElement.scrollWidth") == 360
        assert tab.evaluate("document.querySelector('#scroll').scrollWidth") <= 360
        assert tab.evaluate(wide) == []
        tab.click("#token-view")
    for drawer in ("sidebar", "settings"):
        tab.click(f"[data-opens={drawer}]")
        assert tab.is_visible(f"#{drawer}")
        assert tab.evaluate(wide) == []
        tab.keyboard.press("Escape")
        assert not tab.is_visible(f"#{drawer}")
        assert tab.evaluate("document.activeElement.dataset.opens") == drawer
    say(tab, "short")
    small = """[...document.querySelectorAll("main button")].map((one) => one.getBoundingClientRect())
        .filter(({ width, height }) => width && Math.min(width, height) < 28).length"""
    assert tab.evaluate(small) == 0


def test_a_key_is_asked_for_once_and_forgotten_with_the_tab(tab, context, server):
    server.key = "open sesame"
    tab.reload()
    tab.fill("#key", "open sesame")
    tab.press("#key", "Enter")
    tab.wait_for_selector("#model option", state="attached")
    say(tab, "hello")
    assert shown(tab)[1] == "You said: hello"
    tab.reload()
    say(tab, "again")
    assert len(server.requests) == 2
    other = context.new_page()
    other.goto(server.url)
    other.wait_for_selector("#key-dialog[open]")
    other.keyboard.press("Escape")
    other.wait_for_selector("#notice:has-text('wanted an API key')")
    assert "open sesame" not in other.evaluate("JSON.stringify(localStorage)")
    other.close()
    assert tab.errors  # the browser's own lines about the status
    tab.errors.clear()


@pytest.mark.parametrize(
    ("refusal", "notice"),
    [
        ((429, {"Retry-After": "3"}), "The server has no free place. Try again in 3 s."),
        ((400, {}), "refused as the test says"),
    ],
)
def test_a_refusal_is_said_and_retry_asks_again(tab, server, refusal, notice):
    server.refusal = refusal
    say(tab, "hello")
    assert tab.inner_text("#notice") == notice
    assert tab.inner_text(".assistant .figures") == "no answer"
    server.refusal = None
    say(tab, "still there?")
    assert sent(server) == [("user", "hello"), ("user", "still there?")]  # no answer without a word between them
    server.refusal = refusal
    say(tab, "and now?")
    server.refusal = None
    act(tab, "Retry")
    tab.wait_for_selector("#send:visible")
    assert shown(tab)[-2:] == ["and now?", "You said: and now?"]
    assert not tab.query_selector(".versions")
    assert not tab.is_visible("#notice")
    assert len(tab.errors) == 2  # the browser's own lines about the status
    tab.errors.clear()


def test_a_server_that_is_gone_is_said(tab, server):
    tab.wait_for_selector("#model option", state="attached")
    tab.route("**/v1/chat/completions", lambda route: route.abort())
    say(tab, "hello")
    assert tab.inner_text("#notice") == "The server can't be reached. Is heron serve still running?"
    tab.errors.clear()


def test_an_export_is_all_there_after_an_import_elsewhere(tab, server, tmp_path):
    say(tab, "one")
    act(tab, "Retry")
    tab.wait_for_selector("#send:visible")
    with tab.expect_download() as download:
        tab.click("#export")
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    tab.evaluate("localStorage.clear()")
    tab.reload()
    assert not shown(tab)
    tab.set_input_files("#import-file", file)
    tab.wait_for_selector("article")
    assert shown(tab) == ["one", "You said: one"]
    assert "2 / 2" in tab.inner_text(".versions")


@pytest.mark.parametrize(
    ("change", "notice"),
    [
        (lambda data: "{", "This file is not JSON."),
        (lambda data: {"messages": []}, "This file was not exported here"),
        (lambda data: {**data, "version": 2}, "This file was not exported here"),
        (lambda data: data["conversations"][0]["messages"][0].update(role="admin") or data, "[0]: role: wanted one of"),
        (lambda data: data["conversations"][0]["messages"].reverse() or data, "[0]: parent: wanted a message"),
        (lambda data: data["conversations"][0].pop("system") is None or data, "[0]: system: wanted a text"),
    ],
)
def test_a_file_that_is_no_export_is_refused_whole(tab, tmp_path, change, notice):
    say(tab, "one")
    data = tab.evaluate("""({format: "heron-conversations", version: 1, conversations:
        [JSON.parse(Object.entries(localStorage).find(([key]) => key.startsWith("heron.conversation."))[1])]})""")
    data["conversations"][0]["id"] = "other"
    changed = change(data)
    file = tmp_path / "other.json"
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    tab.set_input_files("#import-file", file)
    tab.wait_for_selector("#notice:visible")
    assert notice in tab.inner_text("#notice")
    assert len(tab.query_selector_all("#conversations li")) == 1


def test_a_conversation_is_deleted_after_a_question(tab):
    say(tab, "one")
    tab.once("dialog", lambda dialog: dialog.dismiss())
    tab.click("[aria-label='Delete one']")
    assert shown(tab)
    tab.once("dialog", lambda dialog: dialog.accept())
    tab.click("[aria-label='Delete one']")
    assert not shown(tab)
    tab.reload()
    assert not tab.query_selector_all("#conversations li")


def test_a_conversation_that_is_deleted_while_it_is_answered_stays_away(tab, server):
    server.endless.add("go on")
    say(tab, "go on", wait=False)
    tab.wait_for_selector(".assistant .text:has-text('more')")
    tab.wait_for_timeout(1100)  # so that the next piece would be saved
    tab.once("dialog", lambda dialog: dialog.accept())
    tab.click("[aria-label='Delete go on']")
    assert server.left.wait(5)
    tab.reload()
    assert not tab.query_selector_all("#conversations li")


def test_states_are_saved_started_from_and_deleted(tab, server):
    open_settings(tab)
    say(tab, "remember this")
    tab.fill("#state-name", "first.state")
    tab.press("#state-name", "Enter")
    tab.wait_for_selector("#state-list li")
    assert server.states == {"first.state": server.requests[0]["session_id"]}
    tab.click("#new")
    tab.click("[aria-label='Start from first.state']")
    say(tab, "what was it?")
    assert sent(server) == [("user", "what was it?")]
    assert server.requests[-1]["state"] == "first.state"
    tab.reload()
    assert tab.get_attribute("[aria-label='Start from first.state']", "aria-pressed") == "true"
    open_settings(tab)
    tab.once("dialog", lambda dialog: dialog.accept())
    tab.click("[aria-label='Delete first.state']")
    tab.wait_for_selector("#state-list li", state="detached")
    assert server.states == {}


def test_the_theme_is_the_systems_until_one_is_chosen(tab):
    background = "getComputedStyle(document.body).backgroundColor"
    tab.emulate_media(color_scheme="light")
    light = tab.evaluate(background)
    tab.emulate_media(color_scheme="dark")
    dark = tab.evaluate(background)
    assert light != dark
    tab.select_option("#theme", "light")
    assert tab.evaluate(background) == light
    tab.reload()
    assert tab.evaluate(background) == light
    tab.select_option("#theme", "")
    assert tab.evaluate(background) == dark


def test_what_ends_an_answer_that_is_not_open_is_said_where_it_is_opened(tab, server):
    server.endless.add("go on")
    say(tab, "go on", wait=False)
    tab.wait_for_selector(".assistant .text:has-text('more')")
    tab.click("#new")
    server.failure = "the engine has failed"
    assert server.ended.wait(5)
    tab.wait_for_timeout(100)
    assert not tab.is_visible("#notice")
    tab.click("#conversations button:has-text('go on')")
    assert tab.inner_text("#notice") == "the engine has failed"
    tab.click("#new")
    tab.click("#conversations button:has-text('go on')")
    assert not tab.is_visible("#notice")


def test_two_tabs_show_the_same_conversations(tab, context, server):
    other = context.new_page()
    other.goto(server.url)
    say(tab, "one")
    other.wait_for_selector("#conversations button:has-text('one')")
    other.click("#conversations button:has-text('one')")
    say(other, "two")
    tab.wait_for_selector("article:nth-child(4)")
    other.close()
