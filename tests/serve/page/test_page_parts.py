"""The parts of the page of `heron serve` one by one, as modules in a browser."""

from __future__ import annotations

MARKDOWN = {
    "one\ntwo\n\nthree": "<p>one\ntwo</p><p>three</p>",
    "a **b** c *d* `e`": "<p>a <strong>b</strong> c <em>d</em> <code>e</code></p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "***both***": "<p><strong><em>both</em></strong></p>",
    "2 * 3 * 4, a ** b, **open": "<p>2 * 3 * 4, a ** b, **open</p>",
    "``a ` b`` and `**c**`": "<p><code>a ` b</code> and <code>**c**</code></p>",
    "a_b_c `open": "<p>a_b_c `open</p>",
    "# One\n### Three #": "<h3>One</h3><h5>Three</h5>",
    "#no heading": "<p>#no heading</p>",
    "- a\n- b\n\ntext": "<ul><li><p>a</p></li><li><p>b</p></li></ul><p>text</p>",
    "3. a\n4. b": '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>',
    "- a\n   1. b\n- c": '<ul><li><p>a</p><ol start="1"><li><p>b</p></li></ol></li><li><p>c</p></li></ul>',
    "- a\n\n  more\n\n- b": "<ul><li><p>a</p><p>more</p></li><li><p>b</p></li></ul>",
    "text\n* a": "<p>text</p><ul><li><p>a</p></li></ul>",
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "1986. A good year": '<ol start="1986"><li><p>A good year</p></li></ol>',
}


RENDER = """async (texts) => {
    const { Markdown } = await import("/page/markdown.js");
    return texts.map((text) => {
        const root = document.createElement("div");
        const began = performance.now();
        new Markdown(root).update(text);
        return { html: root.innerHTML, took: performance.now() - began, code: root.querySelector("pre")?.textContent };
    });
}"""


def test_markdown(tab):
    found = tab.evaluate(RENDER, list(MARKDOWN))
    assert {text: one["html"] for text, one in zip(MARKDOWN, found, strict=True)} == MARKDOWN


def test_a_code_block_is_shown_as_it_stands_even_before_it_ends(tab):
    code = "def f():\n\n    return '**not bold**' # <b>"
    begun = [f"{fence}python\n{code}" for fence in ("```", "~~~~")]
    ended = [f"{begun[0]}\n```\nbehind", f"{begun[1]}\n~~~~\nbehind"]
    found = tab.evaluate(RENDER, begun + ended)
    assert [one["code"] for one in found] == [code] * 4
    assert ["behind" in one["html"] for one in found] == [False, False, True, True]


def test_text_that_grows_looks_as_if_it_had_come_at_once_and_keeps_its_finished_blocks(tab):
    text = "\n\n".join([*MARKDOWN, "```\ncode\n```", "the end"])
    grown, once, kept = tab.evaluate(
        """async (text) => {
            const { Markdown } = await import("/page/markdown.js");
            const [grown, once] = [document.createElement("div"), document.createElement("div")];
            const view = new Markdown(grown);
            view.update(text.slice(0, 40));
            const first = grown.firstElementChild;
            for (let end = 0; end <= text.length; end += 3) view.update(text.slice(0, Math.max(40, end)));
            view.update(text);
            new Markdown(once).update(text);
            return [grown.innerHTML, once.innerHTML, first === grown.firstElementChild];
        }""",
        text,
    )
    assert grown == once
    assert kept


def test_markdown_of_hostile_length_takes_no_time(tab):
    units = ["*a ", "**a ", "`", "``` ", "> ", "- ", "* * ", "#", "a` ``b ", "  - a\n", ">\n", "1. ", "**`*", "\n"]
    found = tab.evaluate(RENDER, [unit * (50_000 // len(unit)) for unit in units])
    assert {unit: one["took"] for unit, one in zip(units, found, strict=True) if one["took"] > 2000} == {}


def test_events_are_read_whatever_the_pieces(tab):
    stream = 'data: {"a": "ä\\u20ac"}\n\n: comment\n\ndata: one\r\ndata: two\r\n\r\nevent: x\ndata:[DONE]\n\n'
    for size in (1, 2, 7, 1000):
        found = tab.evaluate(
            """async ([text, size]) => {
                const { events } = await import("/page/api.js");
                const bytes = new TextEncoder().encode(text);
                const stream = new ReadableStream({ start(out) {
                    for (let at = 0; at < bytes.length; at += size) out.enqueue(bytes.slice(at, at + size));
                    out.close();
                } });
                const found = [];
                for await (const data of events(stream)) found.push(data);
                return found;
            }""",
            [stream, size],
        )
        assert found == ['{"a": "ä\\u20ac"}', "one\ntwo", "[DONE]"]


def test_a_token_that_is_part_of_a_character_shows_its_bytes(tab):
    tokens = [
        {"token": " a", "bytes": [32, 97]},
        {"token": "\ufffd", "bytes": [0xE2, 0x82]},
        {"token": "€", "bytes": [0xE2, 0x82, 0xAC]},
        {"token": "\x07", "bytes": [7]},
        {"token": "x", "bytes": None},
    ]
    texts = tab.evaluate("async (all) => all.map((await import('/page/writer.js')).tokenText)", tokens)
    assert texts == [" a", "⟨e2 82⟩", "€", "⟨07⟩", "x"]


def test_where_the_browsers_space_is_used_up_old_probabilities_make_room(tab):
    fates = tab.evaluate(
        """async () => {
            const { Store } = await import("/page/store.js");
            const { Conversation } = await import("/page/conversation.js");
            const store = new Store();
            const made = (text, count) => {
                const conversation = Conversation.blank();
                const message = conversation.add("", "assistant", text);
                message.tokens = Array.from({ length: count }, () => ["x".repeat(1000), -1, []]);
                store.save(conversation);
                return message;
            };
            const old = made("old", 2500), next = made("next", 2000), last = made("last", 2000);
            let refused = "";
            try { made("x".repeat(6_000_000), 0); } catch (error) { refused = error.message; }
            return [old.tokens.length, next.tokens.length, last.content, new Store().all().length, refused];
        }"""
    )
    assert fates[:1] == [0]
    assert fates[2:4] == ["last", 3]
    assert "used up" in fates[4]
