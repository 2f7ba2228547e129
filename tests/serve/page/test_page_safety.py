"""What a model, a file or a server writes can't script the page of `heron serve`, nor load anything from elsewhere."""

from __future__ import annotations

import json

import pytest

HOSTILE = [
    '<img src=x onerror="window.hacked=1">',
    "</script><script>window.hacked=1</script>",
    "```html\n<script>window.hacked=1</script>\n```",
    '```"><img src=x onerror=window.hacked=1>\ncode',
    "**<svg onload=window.hacked=1>** `</code><iframe src=javascript:window.hacked=1>`",
    '- <a href="javascript:window.hacked=1" autofocus onfocus=window.hacked=1>x</a>',
    "[click](javascript:window.hacked=1) ![x](http://example.com/x.png)",
    "<style>body{display:none}</style><base href=//example.com>",
    "<meta http-equiv=refresh content=0;url=//example.com>",
    "&lt;img src=x onerror=window.hacked=1&gt;\u202e\u0000\u2028",
]


@pytest.fixture
def elsewhere(window, server):
    """The addresses outside the server that the page has asked for, and paths that the test's server does not have."""
    asked = []

    def note(request):
        path = request.url.removeprefix(server.url)
        if path == request.url or not (path == "/" or path.startswith(("/page/", "/v1/"))):
            asked.append(request.url)

    window.on("request", note)
    yield asked
    window.remove_listener("request", note)


def is_harmless(tab, elsewhere):
    made = "document.querySelectorAll('#messages :is(img, script, iframe, svg, style, a, base, meta)').length"
    return not elsewhere and tab.evaluate(f"!window.hacked && !{made} && document.title !== ''")


def test_what_a_model_writes_stays_text(tab, server, elsewhere):
    tab.click("#token-view")
    for number, text in enumerate(HOSTILE):
        server.script[f"attack {number}"] = text
        tab.fill("#message", f"attack {number}")
        tab.press("#message", "Enter")
        tab.wait_for_selector("#send:visible")
        tab.query_selector_all("article:last-child .token")[-1].click()
        assert is_harmless(tab, elsewhere), text
        tab.keyboard.press("Escape")
        tab.click("#token-view")
        assert is_harmless(tab, elsewhere), text
        shown = tab.text_content("article:last-child .text:not(.thought *)")
        assert shown.count("<") == text.count("<"), text
        assert shown.count("window.hacked") == text.count("window.hacked"), text
        tab.click("#token-view")


def test_hostile_names_messages_and_files_stay_text(tab, server, elsewhere, tmp_path):
    attack = "<img src=x onerror=window.hacked=1>"
    server.models = [attack]
    server.states[attack] = "session"
    tab.reload()
    tab.wait_for_selector("#model option", state="attached")
    tab.fill("#message", attack)
    tab.press("#message", "Enter")
    tab.wait_for_selector("#send:visible")
    assert tab.input_value("#title") == attack
    conversation = {
        "id": "__proto__", "title": attack, "system": attack, "state": attack, "chosen": {"__proto__": attack},
        "messages": [
            {"id": "__proto__", "parent": "", "role": "user", "content": attack, "thought": "", "finish": attack},
            {"id": attack, "parent": "__proto__", "role": "assistant", "content": attack, "thought": attack,
             "finish": "constructor", "figures": {"tokens": attack, "perSecond": attack, "firstMs": attack},
             "tokens": [[attack, -1, [[attack, -1]]], ["no", "number", []], None]},
        ],
    }  # fmt: skip
    file = tmp_path / "attack.json"
    file.write_text(json.dumps({"format": "heron-conversations", "version": 1, "conversations": [conversation]}))
    tab.set_input_files("#import-file", file)
    tab.wait_for_selector("#conversations li:nth-child(2)")
    tab.click("#token-view")
    assert is_harmless(tab, elsewhere)
    assert len(tab.query_selector_all("article")) == 2
    tab.reload()
    assert is_harmless(tab, elsewhere)


def test_the_pages_own_policy_forbids_what_could_run_text(tab):
    """A mistake in the page's code would be an error, not a hole."""
    for code in ("element.innerHTML = '<b>x</b>'", "eval('1')", "element.setAttribute('onclick', 'window.hacked = 1')"):
        ran = tab.evaluate(f"""() => {{
            const element = document.createElement("div");
            document.body.append(element);
            try {{ {code}; element.click(); }} catch {{ return false; }}
            return element.children.length > 0 || Boolean(window.hacked);
        }}""")
        assert not ran, code
    assert any("TrustedHTML" in line for line in tab.errors)
    tab.errors.clear()


def test_a_picture_from_elsewhere_is_not_loaded(tab, server):
    url = server.url.replace("127.0.0.1", "localhost") + "/page/heron.svg"
    tab.evaluate(
        "(url) => { const one = document.createElement('img'); one.src = url; document.body.append(one) }", url
    )
    tab.wait_for_timeout(50)
    assert tab.evaluate("document.querySelector('body > img').naturalWidth") == 0
    assert any("Content Security Policy" in line for line in tab.errors)
    tab.errors.clear()
