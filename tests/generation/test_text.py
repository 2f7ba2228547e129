"""From ids to text: characters cut between ids, stop texts cut anywhere, and each way to end."""

from __future__ import annotations

import itertools
import random

import pytest

from heron import tokenizer
from heron.errors import ConfigError, DataError
from heron.generation import TextWriter
from tests.tokenizer.tokenizer_kinds import load

BYTES = tokenizer.load("bytes")
NUMBERS = tokenizer.load("integers:1000:0")


def written(ids, **settings):
    """The pieces for ids up to the one that ends the text, if one does, and the writer."""
    writer = TextWriter(**{"tokenizer": BYTES, **settings})
    pieces = []
    for token in ids:
        pieces.append(writer.push(token))
        if writer.finish:
            break
    return pieces, writer


def test_a_character_is_given_with_its_last_byte():
    pieces, writer = written("aé日🙂".encode())
    assert pieces == ["a", "", "é", "", "", "日", "", "", "", "🙂"]
    assert writer.finish is None
    assert writer.flush() == ""


def test_half_a_character_at_the_end_is_a_replacement():
    pieces, writer = written("日".encode()[:2])
    assert (pieces, writer.flush(), writer.flush(), writer.finish) == (["", ""], "\ufffd", "", None)
    pieces, writer = written("a日".encode(), max_tokens=3)
    assert (pieces, writer.finish) == (["a", "", "\ufffd"], "length")
    assert written(b"a\xe6\x00")[0] == ["a", "", "\ufffd"]


def test_a_stop_text_cut_between_ids_is_held_back_and_left_out():
    pieces, writer = written(b"ab\n\nUser: x", stop="\n\nUser:")
    assert (pieces, writer.finish) == (["a", "b", *[""] * 7], "stop")
    assert writer.flush() == ""
    pieces, writer = written(b"ab\n\nUs", stop=["\n\nUser:", "zz"])
    assert (pieces, writer.finish) == (["a", "b", "", "", "", ""], None)
    assert (writer.flush(), writer.flush()) == ("\n\nUs", "")
    assert written(b"xEENDy", stop="END")[0] == ["x", "", "E", "", ""]
    assert written("a日".encode(), stop="日")[0] == ["a", "", "", ""]


@pytest.mark.parametrize(
    ("ids", "settings", "text", "finish"),
    [
        (b"ab\x00", {}, "ab", "end"),
        (b"abc", dict(stop_ids=[99]), "ab", "stop"),
        (b"ab", dict(max_tokens=2), "ab", "length"),
        (b"ab", dict(max_tokens=2, stop="b"), "a", "stop"),  # both at once: the text that says so
        (b"a\n\x00", dict(stop="\n\n"), "a\n", "end"),  # what was held back is certain now
        (b"a\nc", dict(stop="\n\n", stop_ids=[99]), "a\n", "stop"),
        (b"a\n", dict(stop="\n\n", max_tokens=2), "a\n", "length"),
        (b"a\xe6\x00", dict(stop="\ufffd"), "a", "stop"),  # a stop text in what was held back
        (b"a\xe6c", dict(stop="a\ufffd", stop_ids=[99]), "", "stop"),
        (b"a\xe6", dict(stop="\ufffd", max_tokens=2), "a", "stop"),
    ],
)
def test_a_text_says_how_it_ended_and_all_of_it_was_given(ids, settings, text, finish):
    pieces, writer = written(ids, **settings)
    assert ("".join(pieces), writer.finish) == (text, finish)
    assert len(pieces) == len(ids)
    assert writer.flush() == ""
    with pytest.raises(ConfigError, match=rf"text: it has ended \({finish}\)"):
        writer.push(97)


def test_integers_are_words():
    settings = dict(tokenizer=NUMBERS, before=[7], stop="4 5")
    assert written([94, 4, 6, 4, 5], **settings)[0] == [" 94", "", " 4 6", "", ""]
    pieces, writer = written([4], **settings)
    assert (pieces, writer.flush()) == ([""], " 4")
    assert written([4, 5], tokenizer=NUMBERS, before=[0])[0] == ["4", " 5"]  # an end of document is no text
    assert written([4, 0], tokenizer=NUMBERS, stop="4 5")[0] == ["", "4"]


@pytest.mark.parametrize("kind", ["world", "llama", "metaspace", "byte level", "word piece"])
def test_the_pieces_are_the_text_behind_the_prompts(kind):
    tokens = load(kind)
    before = tokens.encode("the grey")
    ids = tokens.encode("the grey heron the river")[len(before) :]
    pieces, writer = written(ids, tokenizer=tokens, before=before)
    assert "".join(pieces) + writer.flush() == tokens.decode([*before, *ids])[len(tokens.decode(before)) :]
    assert not any("\ufffd" in piece for piece in pieces)


def test_stop_texts_are_found_where_a_search_of_the_whole_text_finds_them():
    chance = random.Random(2)
    for _ in range(400):
        text = "".join(chance.choice("ab") for _ in range(chance.randrange(14)))
        stops = ["".join(chance.choice("ab") for _ in range(chance.randint(1, 5))) for _ in range(chance.randrange(4))]
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        pieces, writer = written(text.encode(), stop=stops)
        end, start = min(found, default=(len(text), len(text)))
        assert (len(pieces), writer.finish) == (end, "stop" if found else None)
        assert "".join(pieces) + writer.flush() == text[:start]
        for n, piece in enumerate(itertools.accumulate(pieces)):
            held = text[len(piece) : n + 1]  # only what could become one, or is
            assert any(stop.startswith(held) for stop in stops) or not held or n + 1 == end


def test_what_cannot_be_is_refused():
    for settings, words in (
        (dict(stop=["x", ""]), "stop: wanted texts of at least one character"),
        (dict(tokenizer=NUMBERS, stop=" "), "stop: wanted texts of at least one word"),
        (dict(tokenizer=NUMBERS, stop="x"), "stop: .*integers"),
        (dict(stop=[3]), "ids are for stop_ids"),
        (dict(stop=3), "ids are for stop_ids"),
    ):
        with pytest.raises(ConfigError, match=words):
            written([], **settings)
    assert TextWriter(BYTES, max_tokens=0).finish == "length"
    with pytest.raises(DataError):
        TextWriter(tokenizer.load("world")).push(65531)
