import hashlib
from pathlib import Path

import numpy as np
import pyrwkv_tokenizer
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heron.errors import ConfigError, DataError
from heron.tokenizer import TextStream, id_dtype, load
from tests.tokenizer.tokenizer_kinds import KINDS, byte_level
from tests.tokenizer.tokenizer_kinds import load as kinds_load

MIXED = "Grüße, 世界! 🦩🏳️‍🌈 é\n\tx = 1\r\n"


@pytest.fixture(scope="module")
def world():
    return load("world")


@pytest.fixture(scope="module")
def longest_match(world):
    """World by its definition, for any bytes: at each place the longest token that they go on with."""
    ids = {token: index for index, token in enumerate(world.table) if token}
    longest = max(map(len, ids))

    def encode(data):
        found = []
        while data:
            token = next(data[:n] for n in range(min(longest, len(data)), 0, -1) if data[:n] in ids)
            found.append(ids[token])
            data = data.removeprefix(token)
        return found

    return encode


@pytest.fixture(scope="module")
def byte_level_json(tmp_path_factory):
    """A byte-level BPE like GPT-NeoX's, with an end token and an added token that holds raw spaces."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the heron stands in the water", "the water is still"], trainer)
    bpe.add_tokens(["    ", "é|"])
    bpe.enable_truncation(2)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    bpe.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def fallback_json(tmp_path_factory):
    """A BPE like Llama's: metaspace words, single bytes for what they miss, and a gap in the ids."""
    words = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b"]
    vocab = {word: index for index, word in enumerate(words)} | {"c": len(words) + 3}
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [("▁", "a"), ("▁", "b")], byte_fallback=True, unk_token="<s>")
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    bpe.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace(), tokenizers.decoders.Fuse()]
    )
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    bpe.save(str(path))
    return str(path)


def streamed(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [*(stream.push(i) for i in ids), stream.flush()]


WORLD_GOLDEN = {
    "The Eiffel tower is in the city of": [6699, 304, 25740, 109, 39990, 4600, 4596, 22590, 30449, 4706],
    "User: hi\n\nAssistant:": [24281, 59, 4571, 261, 5585, 41693, 59],
    "\n\n": [261],
    "Assistant: ": [5585, 41693, 59, 33],
    "": [],
    "\0": [1],
}


@pytest.mark.parametrize(("text", "ids"), WORLD_GOLDEN.items())
def test_world_golden(world, longest_match, text, ids):
    assert world.encode(text) == ids
    assert longest_match(text.encode()) == ids
    assert world.encode_array(text).tolist() == ids
    assert world.encode_array(text).dtype == np.uint16
    assert world.decode(ids) == text


def test_world_table(world):
    path = Path(pyrwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
    assert hashlib.md5(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest() == "dd1946a66e1721abeac49f9c75a1e844"
    assert (world.vocab_size, world.eod, world.spec) == (65536, 0, "world")
    assert [world.decode_bytes([byte + 1]) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert world.decode_bytes([65529]) == b" " * 128
    assert world.decode([0]) == ""
    assert sum(len(world.decode_bytes([i])) == 0 for i in range(65530)) == 1


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_world_text_equals_pyrwkv_tokenizer_and_the_longest_match(world, longest_match, text):
    ids = world.encode(text)
    assert ids == longest_match(text.encode())
    assert world.decode(ids) == text


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_world_bytes_round_trip(world, longest_match, data):
    ids = longest_match(data)
    assert world.decode_bytes(ids) == data
    assert world.decode(ids) == data.decode("utf-8", errors="replace")
    assert "".join(streamed(world, ids)) == world.decode(ids)


@pytest.mark.parametrize("token", [65530, 65535, 65536, -1])
def test_world_refuses_ids_without_bytes(world, token):
    with pytest.raises(DataError, match=f"id {token} at position 2"):
        world.decode([1, 2, token])


def test_bytes():
    tokenizer = load("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.spec) == (256, 0, "bytes")
    assert tokenizer.encode(MIXED) == list(MIXED.encode())
    assert tokenizer.encode_array(MIXED).tobytes() == MIXED.encode()
    assert tokenizer.decode(tokenizer.encode(MIXED)) == MIXED
    assert [tokenizer.decode_bytes([i]) for i in range(256)] == [b"", *(bytes([i]) for i in range(1, 256))]
    assert tokenizer.decode(np.array([104, 105], dtype=np.uint16)) == "hi"
    assert tokenizer.decode([0xE4, 0x41]) == "\ufffdA"
    assert tokenizer.decode([]) == ""
    with pytest.raises(DataError, match="character 3"):
        tokenizer.encode("äöü\0x")
    with pytest.raises(DataError, match="id 256 at position 1"):
        tokenizer.decode([65, 256])


def test_integers():
    tokenizer = load("integers:12")
    assert (tokenizer.vocab_size, tokenizer.eod) == (12, None)
    assert tokenizer.encode(" 3 11\n007\t0 ") == [3, 11, 7, 0]
    assert tokenizer.decode([3, 11, 7, 0]) == "3 11 7 0"
    assert tokenizer.encode(tokenizer.decode(range(12))) == list(range(12))
    assert tokenizer.decode_bytes([3, 11]) == b"3 11"
    assert load("integers:12:11").eod == 11
    assert load("integers:100000").encode_array("99999").dtype == np.int32
    with pytest.raises(DataError, match="id 12 at position 0"):
        tokenizer.decode([12])


@pytest.mark.parametrize("word", ["12", "-1", "1.5", "1_0", "x", "٣", "9" * 5000])
def test_integers_refuses(word):
    with pytest.raises(DataError, match="as word 3"):
        load("integers:12").encode(f"1 2 {word} 4")


@pytest.mark.parametrize("spec", ["world", "bytes", "integers:12", "integers:12:0"])
def test_spec_makes_the_tokenizer_again(spec):
    assert load(spec).spec == spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wrld", "mean 'world'"),
        ("byte", "mean 'bytes'"),
        ("integer:5", "mean 'integers"),
        ("integers", "integers:1000"),
        ("bpe", "as in bpe:512, which heron train learns"),
        ("integers:x", "integers:1000"),
        ("integers:0", "1 <= V"),
        ("integers:5:5", "below V = 5"),
        ("", "there are world"),
    ],
)
def test_unknown_spec(spec, message):
    with pytest.raises(ConfigError, match=message):
        load(spec)


def test_byte_level_json(byte_level_json):
    tokenizer = load(byte_level_json)
    whole = tokenizers.Tokenizer.from_file(byte_level_json)
    whole.no_truncation()
    assert tokenizer.vocab_size == max(whole.get_vocab().values()) + 1
    assert tokenizer.eod == whole.token_to_id("<|endoftext|>")
    assert tokenizer.spec == byte_level_json
    text = "the heron    in é| water " + MIXED
    ids = tokenizer.encode(text)
    assert ids == whole.encode(text).ids
    assert len(ids) > 2
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()
    assert tokenizer.decode([*ids, tokenizer.eod]) == text
    assert sorted(b for i in range(tokenizer.vocab_size) if len(b := tokenizer.decode_bytes([i])) == 1) == [
        bytes([byte]) for byte in range(256)
    ]


def test_fallback_json(fallback_json):
    tokenizer = load(fallback_json)
    assert tokenizer.eod == 1
    assert tokenizer.vocab_size == 267
    ids = tokenizer.encode("a b é世a")
    assert tokenizer.decode(ids) == "a b é世a"
    assert tokenizer.decode([*ids, 1]) == "a b é世a"
    assert tokenizer.decode_bytes(ids) == "a b é世a".encode()
    with pytest.raises(DataError, match="id 264 at position 1 is a gap"):
        tokenizer.decode([2, 264])
    with pytest.raises(DataError, match="id 267"):
        tokenizer.decode([267])


@pytest.mark.parametrize("content", [None, b"{}", b"not json", b"\xff"])
def test_damaged_json(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="tokenizer.json"):
        load(str(path))


@pytest.fixture(params=["world", "bytes", "byte_level_json", "fallback_json"])
def text_tokenizer(request):
    return load(request.getfixturevalue(request.param) if "json" in request.param else request.param)


@pytest.mark.parametrize("text", ["a b\ud800", "\udfff"])
def test_lone_surrogate_is_refused(text_tokenizer, text):
    with pytest.raises(DataError, match=f"character {len(text) - 1}"):
        text_tokenizer.encode(text)


@pytest.mark.parametrize("text", ["a b a", "é世🦩a 世世", "a\ufffdb", "世", ""])
def test_stream_joins_to_the_text(text_tokenizer, text):
    parts = streamed(text_tokenizer, text_tokenizer.encode(text))
    assert "".join(parts) == text
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


def test_stream_shows_each_character_once_it_is_complete():
    assert streamed(load("bytes"), "é🦩a".encode()) == ["", "é", "", "", "", "🦩", "a", ""]


def test_stream_shows_fallback_characters_once_they_are_complete(fallback_json):
    tokenizer = load(fallback_json)
    assert streamed(tokenizer, tokenizer.encode("a 世世 b")) == ["a", " ", "", "", "世", "", "", "世", " b", ""]


def test_stream_flushes_half_a_character_and_starts_anew(text_tokenizer):
    stream = TextStream(text_tokenizer)
    ids = text_tokenizer.encode("a🦩")
    assert "".join(map(stream.push, ids[:-1])) == "a"
    assert set(stream.flush()) == {"\ufffd"}
    assert "".join(map(stream.push, ids)) + stream.flush() == "a🦩"


def test_stream_of_integers_keeps_the_spaces():
    assert streamed(load("integers:100"), [5, 17, 0]) == ["5", " 17", " 0", ""]


@given(st.lists(st.integers(0, 255), max_size=30))
@settings(max_examples=100, deadline=None)
def test_stream_of_any_bytes(ids):
    tokenizer = load("bytes")
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, np.uint16), (65536, np.uint16), (65537, np.int32)])
def test_id_dtype(vocab_size, dtype):
    assert id_dtype(vocab_size) is dtype


@pytest.mark.parametrize("ids", [[1.5], ["a"], [[1, 2]], 7, [True]])
def test_ids_must_be_a_flat_list_of_integers(ids):
    with pytest.raises(DataError, match="flat sequence"):
        load("bytes").decode(ids)


@pytest.mark.parametrize("kind", [*KINDS, "integers:37:0"])
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_stream_is_what_decode_gives_for_any_ids(kind, data):
    tokenizer = kinds_load(kind)
    ids = st.integers(0, min(tokenizer.vocab_size, 65530) - 1)
    if kind in ("llama", "metaspace"):  # bytes and text in turn
        ids = st.one_of(ids, st.sampled_from([*tokenizer.encode("the é世🦩"), *range(0xE2, 0xF8)]))
    before = data.draw(st.lists(ids, max_size=40))
    after = data.draw(st.lists(ids, max_size=70))
    assert "".join(streamed(tokenizer, after)) == tokenizer.decode(after)
    in_front = TextStream(tokenizer)
    shown = "".join(map(in_front.push, before))
    going_on = TextStream(tokenizer, before)
    text = shown + "".join(map(going_on.push, after)) + going_on.flush()
    assert text == tokenizer.decode([*before, *after])


def test_broken_bytes_of_a_fallback_take_no_character_with_them():
    tokenizer = kinds_load("llama")

    def ids(*data):
        return [byte + 3 for byte in data]

    assert tokenizer.decode([*ids(0x72, 0xE4), *tokenizer.encode("the a")]) == "r\ufffd the a"
    assert tokenizer.decode(ids(*"é".encode(), 0xFF, *"世".encode())) == "é\ufffd世"
    assert tokenizer.decode(ids(0xE4, 0xB8)) == "\ufffd"  # one character that was cut short
    assert streamed(tokenizer, [*ids(0x72, 0xE4), *tokenizer.encode(".")]) == ["r", "", "\ufffd ", ".", ""]
    whole = tokenizer.encode("a é世🦩 b")
    assert tokenizer.decode(whole) == tokenizer._tokenizer.decode(whole) == "a é世🦩 b"


def test_a_stream_behind_a_prompt_gives_what_stands_behind_it():
    for kind, before, text in (
        ("llama", "the heron waits at the", " river"),
        ("metaspace", "a", " w"),
        ("integers:1000", "4 325", " 159 7"),
        ("word piece", "the grey", " heron"),
        ("byte level, space in front", "the", " heron"),
        ("bytes", "ab", "c é"),
    ):
        tokenizer = kinds_load(kind)
        whole, read = tokenizer.encode(before + text), tokenizer.encode(before)
        assert whole[: len(read)] == read
        stream = TextStream(tokenizer, read)
        assert "".join(map(stream.push, whole[len(read) :])) + stream.flush() == text
    half = TextStream(load("bytes"), [0xC3])
    assert half.push(0xA9) == "é"  # the whole character, once it is one
    assert TextStream(load("world"), [65531, 5]).push(0x41 + 1) == "A"


@pytest.mark.parametrize("kind", ["bytes", "world", "integers:9", "byte level", "llama"])
def test_what_is_no_text_is_not_encoded(kind):
    for text in (3, None, b"text", ["text"], np.array([1])):
        with pytest.raises(DataError, match=f"wanted a text, a str, got {type(text).__name__}"):
            kinds_load(kind).encode(text)


def test_the_end_of_a_document_may_be_a_number(tmp_path):
    assert load("integers:9", 0).eod == 0
    assert load("world", np.int64(0)).eod == 0
    path = tmp_path / "tokenizer.json"
    byte_level().save(str(path))
    assert load(path, 97).eod == 97
    for spec, eod in (("bytes", 1), ("integers:9:1", 2), ("integers:9", 9), (path, 100_000)):
        with pytest.raises(ConfigError):
            load(spec, eod)


def test_a_byte_order_mark_at_the_head_of_a_tokenizer_json_is_left_out(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level().to_str(), encoding="utf-8-sig")
    assert load(path).decode(load(path).encode("as it was")) == "as it was"
    with pytest.raises(DataError, match="none.json: cannot be read as a tokenizer.json: No such file or directory$"):
        load(tmp_path / "none.json")
