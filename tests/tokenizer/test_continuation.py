"""Texts that go on in other texts: both halves have the ids of the whole, for every kind of tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heron import tokenizer
from heron.errors import DataError
from heron.tokenizer.continuation import encode_behind, encode_marked, encode_pair
from tests.tokenizer.tokenizer_kinds import KEEP_ALL, KINDS, SENTENCES, load

TEXTS = st.text(alphabet="ab the\n.12é世", max_size=12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_halves_of_a_text_have_its_ids_wherever_it_is_cut(kind):
    tok = load(kind)
    for text in SENTENCES:
        whole = tok.encode(text)
        for cut in range(len(text) + 1):
            context, continuation = encode_pair(tok, text[:cut], text[cut:])
            assert context + continuation == whole
            alone = tok.encode(text[:cut])
            if whole[: len(alone)] == alone:  # the harness's cut, where it cuts this text
                assert context == alone
            if kind in KEEP_ALL:  # no id more would lie in the context from end to end
                assert text[:cut].startswith(tok.decode(context))
                further = tok.decode(whole[: len(context) + 1])
                assert not 0 < cut < len(text) or len(further) > cut


@given(TEXTS, TEXTS)
@settings(max_examples=60, deadline=None)
def test_any_two_halves(context, continuation):
    for kind in KINDS:
        tok = load(kind)
        first, second = encode_pair(tok, context, continuation)
        assert first + second == tok.encode(context + continuation)
        if kind in KEEP_ALL and continuation.strip():
            assert second


@pytest.mark.parametrize(
    ("kind", "context", "continuation", "pieces"),
    [
        ("llama", "the river at", " the", ["▁the"]),  # alone it would be "▁", "▁the"
        ("llama", "r", "iver", ["i", "v", "er"]),
        ("llama", "at t", "he", ["▁the"]),  # across the border: all of "▁the" goes on behind "at"
        ("metaspace", "a", " w", ["▁w"]),
        ("metaspace", "a", "w", ["w"]),  # alone it would be "▁w"
        ("metaspace", "a ", "w", ["▁w"]),
        ("byte level", "it is\n\n", "where", None),  # the context alone ends in another id than inside the text
        ("word piece", "the her", "on", ["heron"]),
        ("unigram", "the", " river", None),
    ],
)
def test_cuts_by_hand(kind, context, continuation, pieces):
    tok = load(kind)
    first, second = encode_pair(tok, context, continuation)
    assert first + second == tok.encode(context + continuation)
    if pieces is not None:
        assert [tok._tokenizer.id_to_token(i) for i in second] == pieces
    else:
        assert tok.decode(first) == context
        assert tok.decode(second) in (continuation, continuation.strip())


def test_an_id_that_stands_for_the_end_of_a_text_is_two_inside_it():
    tok = load("byte level")
    newlines = tok.encode("it is\n\n")[-1:]
    assert tok.decode(newlines) == "\n\n"
    context, continuation = encode_pair(tok, "it is\n\n", "User")
    assert [tok.decode([i]) for i in context[-2:]] == ["\n", "\n"]
    assert tok.decode(continuation) == "User"
    assert encode_behind(tok, newlines, "User") == continuation
    assert encode_behind(tok, context, "User") == continuation


def test_world_takes_the_longest_id_across_the_border():
    world = load("world")
    context, continuation = encode_pair(world, "the r", "iver")
    assert [world.decode([i]) for i in context + continuation] == ["the", " river"]
    assert len(context) == 1


def test_integers_are_cut_between_numbers():
    numbers = tokenizer.load("integers:1000")
    assert encode_pair(numbers, "4 325", " 159") == ([4, 325], [159])
    assert encode_pair(numbers, "4 32", "5 159") == ([4], [325, 159])
    assert encode_behind(numbers, [4], "5 6") == [5, 6]
    with pytest.raises(DataError):
        encode_pair(numbers, "4", "x")


@pytest.mark.parametrize("kind", KEEP_ALL)
def test_a_text_behind_ids_is_the_text_that_goes_on(kind):
    tok = load(kind)
    for before in ("the heron", "it is\n\n", "a ", "t", "é"):
        read = tok.encode(before)
        for text in (" waits", "waits", "\n\nUser: a", " ", "he", "世"):
            ids = encode_behind(tok, read, text)
            assert tok.decode([*read, *ids]) == before + text
            assert tok.decode([*read[-1:], *ids]).endswith(text)


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_only_what_begins_a_text_has_a_space_in_front(kind):
    tok = load(kind)
    inside = encode_pair(tok, "a\n", "he")[1]
    assert tok.encode("he") != inside
    assert encode_behind(tok, (), "he") == inside  # behind what nobody knows
    assert encode_behind(tok, tok.encode("\n"), "he") == inside
    assert encode_behind(tok, [tok.eod], "he") == tok.encode("he")
    assert encode_behind(tok, tok.encode("a"), "") == []


def test_ids_that_stand_for_nothing_may_lie_before():
    assert encode_behind(load("world"), [65531], " river") == load("world").encode(" river")


@pytest.mark.parametrize("kind", KEEP_ALL)
def test_an_id_is_marked_where_it_holds_a_character_of_a_marked_part(kind):
    chosen = load(kind)
    text, n_across = SENTENCES[2], 0
    whole = chosen.encode(text)
    for border in range(1, len(text)):
        head, tail = text[:border], text[border:]
        context, continuation = encode_pair(chosen, head, tail)
        assert encode_marked(chosen, [(head, False), (tail, True)]) == (
            whole, [False] * len(context) + [True] * len(continuation),
        )  # fmt: skip
        ids, marks = encode_marked(chosen, [(head, True), (tail, False)])
        assert ids == whole
        across = chosen.decode(context) != head  # an id of both sides
        n_across += across
        assert marks == [True] * (len(context) + across) + [False] * (len(continuation) - across)
        middle = encode_marked(chosen, [(head[:-1], False), (head[-1:], True), ("", False), (tail, False)])[1]
        assert 1 <= sum(middle) <= 3
    assert n_across > 0 or kind == "bytes"
