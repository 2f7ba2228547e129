"""The page against `heron serve` itself, with a tiny model of random weights on a CPU."""

from __future__ import annotations

import re

import httpx
import pytest


@pytest.fixture
def open_page(window, serve, engine_of):
    """A function: settings of the server -> the page on it, with short answers of a fixed seed, and its address."""

    def at(**settings):
        address = serve(engine_of(), **settings)
        window.goto(address)
        if "api_key" in settings:
            window.fill("#key", settings["api_key"])
            window.press("#key", "Enter")
        window.click("[data-opens=settings]")
        window.fill("#max_completion_tokens", "24")
        window.fill("#seed", "1")
        return window, address

    window.set_viewport_size({"width": 1400, "height": 800})
    yield at
    assert not window.errors


def say(tab, text):
    tab.fill("#message", text)
    tab.press("#message", "Enter")
    tab.wait_for_selector("#send:visible")


def prompt(tab):
    """Tokens of the last prompt, and how many of them had been read before."""
    title = tab.get_attribute("article:last-child .figures", "title")
    return [int(number) for number in re.findall(r"\d+", title)]


def test_a_conversation_is_read_once_and_its_branches_too(open_page):
    tab, _ = open_page()
    say(tab, "hello there")
    assert prompt(tab) == [len("User: hello there\n\nAssistant:"), 0]
    first = tab.inner_text("article:last-child > .text")
    assert first
    tab.fill("#seed", "0")  # the second version of an answer adds 1
    tab.click("article:last-child [data-action=Retry]")
    tab.wait_for_selector("#send:visible")
    assert tab.inner_text("article:last-child > .text") == first
    whole, cached = prompt(tab)
    assert whole - len(" Assistant:\n\n") <= cached < whole
    say(tab, "go on")
    whole, cached = prompt(tab)
    assert len("User: hello there") <= cached < whole


def test_tokens_of_the_model_are_shown_with_the_likeliest(open_page):
    tab, _ = open_page()
    tab.click("#token-view")
    say(tab, "hello")
    assert len(tab.query_selector_all("article:last-child .token")) == 24
    tab.click("article:last-child .token >> nth=3")
    shares = [float(one.inner_text().split()[0]) for one in tab.query_selector_all("#likeliest td:last-child")]
    assert len(shares) in (10, 11)  # one more where the token that was drawn is not among them
    assert shares[:10] == sorted(shares[:10], reverse=True)
    assert 0 < sum(shares) <= 100


def test_a_stop_frees_the_servers_place(open_page):
    tab, address = open_page(rows=1)
    tab.fill("#max_completion_tokens", "30000")
    for name in ("top_p", "presence_penalty", "frequency_penalty"):  # the likeliest byte is never the one that ends
        tab.fill(f"#{name}", "0")
    tab.fill("#message", "hello")
    tab.press("#message", "Enter")
    tab.wait_for_selector("article.assistant:not(.silent)")
    tab.keyboard.press("Escape")
    tab.wait_for_selector("#send:visible")
    assert tab.inner_text("article:last-child .figures").startswith("stopped")
    for _ in range(100):
        if 'heron_open_sequences{model="tiny"} 0.0' in httpx.get(f"{address}/metrics").text:
            return
        tab.wait_for_timeout(20)
    raise AssertionError("the sequence is still written")


def test_a_state_is_saved_and_another_conversation_starts_from_it(open_page):
    tab, _ = open_page()
    say(tab, "remember this")
    tab.fill("#state-name", "here.1")
    tab.press("#state-name", "Enter")
    tab.wait_for_selector("#state-list li")
    tab.click("#new")
    say(tab, "what was it?")
    alone = tab.inner_text("article:last-child > .text")
    tab.click("#new")
    tab.click("[aria-label='Start from here.1']")
    say(tab, "what was it?")
    assert tab.inner_text("article:last-child > .text") != alone
    assert not tab.is_visible("#notice")
    tab.once("dialog", lambda dialog: dialog.accept())
    tab.click("[aria-label='Delete here.1']")
    tab.wait_for_selector("#state-list li", state="detached")
    say(tab, "and now?")
    assert "here.1" in tab.inner_text("#notice")
    assert len(tab.errors) == 1  # the browser's own line about the status
    tab.errors.clear()


def test_the_page_comes_without_a_key_and_all_else_with_it(open_page):
    tab, address = open_page(api_key="open-sesame")
    say(tab, "hello")
    assert tab.inner_text("article:last-child > .text")
    assert all("401" in line for line in tab.errors)
    tab.errors.clear()
    for name in ("", "page/page.js", "page/page.css", "page/heron.svg"):
        answer = httpx.get(f"{address}/{name}")
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert httpx.get(f"{address}/page/..%2Fapp.py").status_code == 404
