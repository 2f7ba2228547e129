import json

import numpy as np
import pytest
import torch

from heron import tokenizer
from heron.data.binidx import write
from heron.data.corpora import Reading, read_documents
from heron.data.loader import Batches, Corpus, load_corpus
from heron.errors import DataError

BYTES = tokenizer.load("bytes")


def load(data, val_data=None, val_fraction=None, tok=BYTES, vocab_size=None) -> Corpus:
    return load_corpus(str(data), tok, val_data and str(val_data), val_fraction, vocab_size or tok.vocab_size)


def text_file(tmp_path, text, name="a.txt"):
    (tmp_path / name).write_bytes(text.encode())
    return tmp_path / name


def jsonl(tmp_path, texts):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path / "a.jsonl"


@pytest.fixture
def pair(tmp_path):
    """Forty tokens 1..40, a binidx of two documents."""
    write(tmp_path / "pair", [range(1, 31), range(31, 41)], vocab_size=256)
    return tmp_path / "pair"


def test_the_last_tenth_of_text_is_validation(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(200))
    corpus = load(text_file(tmp_path, text))
    assert bytes(corpus.train) == text[:180].encode() + b"\0"
    assert bytes(corpus.val) == text[180:].encode() + b"\0"
    assert corpus.val_bytes == 19
    assert (corpus.kind, corpus.name) == ("text", "a.txt")


@pytest.mark.parametrize(
    ("fraction", "train", "val"),
    [
        (0.1, ["abcdefgh", "ij", "klmnopqr"], ["st"]),
        (0.5, ["abcdefgh", "ij"], ["klmnopqrst"]),
        (0.6, ["abcdefgh"], ["ij", "klmnopqrst"]),
        (0.55, ["abcdefgh", "i"], ["j", "klmnopqrst"]),
        (0.7, ["abcdef"], ["gh", "ij", "klmnopqrst"]),
    ],
)
def test_split_walks_from_the_end(tmp_path, fraction, train, val):
    corpus = load(jsonl(tmp_path, ["abcdefgh", "ij", "klmnopqrst"]), val_fraction=fraction)
    assert bytes(corpus.train) == "".join(f"{text}\0" for text in train).encode()
    assert bytes(corpus.val) == "".join(f"{text}\0" for text in val).encode()
    assert corpus.val_bytes == sum(map(len, val)) - 1


@pytest.mark.parametrize("fraction", [0.3, 0.35, 0.4, 0.45, 0.5])
def test_split_falls_between_characters(tmp_path, fraction):
    text = "ä世🦩" * 20
    corpus = load(text_file(tmp_path, text), val_fraction=fraction)
    train, val = (BYTES.decode(ids) for ids in (corpus.train, corpus.val))
    assert train + val == text
    assert 180 * fraction - 4 < len(val.encode()) <= 180 * fraction


def test_split_of_integers_falls_between_words(tmp_path):
    numbers = [100 + i for i in range(50)]
    for fraction in (0.1, 0.11, 0.115, 0.12):
        path = text_file(tmp_path, " ".join(map(str, numbers)))
        corpus = load(path, val_fraction=fraction, tok=tokenizer.load("integers:1000"))
        assert [*corpus.train, *corpus.val] == numbers
        assert corpus.val_bytes is None


@pytest.mark.parametrize("spec", ["bytes", "world"])
def test_val_bytes_are_those_of_the_targets(tmp_path, spec):
    tok = tokenizer.load(spec)
    corpus = load(jsonl(tmp_path, ["Grüße an alle Welt. " * 20, "世界🦩 " * 20]), tok=tok)
    assert corpus.val_bytes == len(tok.decode_bytes(corpus.val[1:]))
    assert 0 < corpus.val_bytes < 75


def test_separate_validation(tmp_path, pair):
    text = text_file(tmp_path, "abcdef")
    corpus = load(text, val_data=pair)
    assert bytes(corpus.train) == b"abcdef\0"
    assert corpus.val.tolist() == list(range(1, 41))
    assert (corpus.kind, corpus.val_bytes) == ("text", 39)
    corpus = load(pair, val_data=text)
    assert (corpus.kind, len(corpus.train), bytes(corpus.val), corpus.val_bytes) == ("binidx", 40, b"abcdef\0", 5)


@pytest.mark.parametrize(
    "settings", [dict(column="a"), dict(glob="*.py"), dict(split_at="x"), dict(column="a", glob="b")]
)
def test_what_cannot_change_a_binidx_is_told(pair, settings):
    with pytest.warns(UserWarning, match=f"pair: is a binidx.*: {', '.join(settings)} change nothing"):
        load_corpus(str(pair), BYTES, None, None, 256, Reading(**settings))
    for name in (pair, f"{pair}x"):
        with pytest.raises(DataError, match="binidx pair, which is encoded" if name == pair else "no such file"):
            list(read_documents(str(name)))


def test_binidx_keeps_nothing_for_validation_unless_asked(pair):
    corpus = load(pair)
    assert corpus.train.tolist() == list(range(1, 41))
    assert (corpus.val, corpus.val_bytes, corpus.kind, corpus.name) == (None, None, "binidx", "pair")
    corpus = load(f"{pair}.bin", val_fraction=0.25)
    assert corpus.train.tolist() == list(range(1, 31))
    assert corpus.val.tolist() == list(range(31, 41))
    assert corpus.val_bytes == 9
    assert isinstance(corpus.train, np.memmap)


def test_text_without_validation(tmp_path):
    corpus = load(text_file(tmp_path, "abcdef"), val_fraction=0.0)
    assert (bytes(corpus.train), corpus.val, corpus.val_bytes) == (b"abcdef\0", None, None)


def test_bytes_of_a_binidx_are_unknown_for_integers(pair):
    assert load(pair, val_fraction=0.5, tok=tokenizer.load("integers:100")).val_bytes is None


def test_ids_outside_the_vocabulary_are_named(tmp_path, pair, monkeypatch):
    monkeypatch.setattr("heron.data.binidx._TOKENS", 7)
    with pytest.raises(DataError, match="pair: id 31 at position 30 is outside the vocabulary of 31"):
        load(pair, vocab_size=31)
    write(tmp_path / "signed", [[70000, 2, 3, 4, 5, 6, 7, 8, 9]], vocab_size=70001)
    raw = np.memmap(tmp_path / "signed.bin", dtype="<i4")
    raw[8] = -3
    raw.flush()
    with pytest.raises(DataError, match="signed: id -3 at position 8"):
        load(tmp_path / "signed", vocab_size=70001)
    with pytest.raises(DataError, match=r"a.txt: id 122 \(token 1\) is outside the vocabulary of 122"):
        load(text_file(tmp_path, "azaz"), vocab_size=122)


def test_a_binidx_of_another_tokenizer_is_noticed(tmp_path):
    write(tmp_path / "pair", [[5, 300, 400]], vocab_size=65536)
    with pytest.raises(DataError, match="pair: was it made with another tokenizer.*id 400"):
        load(tmp_path / "pair", val_fraction=0.7, vocab_size=65536)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "at least 2 tokens to train on, got 0"),
        (b"ab\xff", "position 2"),
        (b"ab\0", "NUL"),
        (b"abc", "at least 2 validation tokens, got 0; .*val_fraction 0"),
    ],
)
def test_unfit_text(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=f"a.txt: .*{message}"):
        load(tmp_path / "a.txt")


def test_half_a_pair_is_refused(pair):
    pair.with_suffix(".idx").unlink()
    with pytest.raises(DataError, match="pair.idx: missing"):
        load(pair)


def test_fingerprint_follows_the_tokens(tmp_path, pair):
    text = "some text " * 20
    corpora = [
        load(text_file(tmp_path, text)),
        load(text_file(tmp_path, text.upper())),
        load(text_file(tmp_path, text), val_fraction=0.2),
        load(text_file(tmp_path, text), val_fraction=0.0),
        load(pair),
        load(pair, val_fraction=0.5),
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == len(corpora)
    assert all(len(corpus.fingerprint) == 16 and int(corpus.fingerprint, 16) >= 0 for corpus in corpora)
    assert load(text_file(tmp_path, text, "b.txt")).fingerprint == corpora[0].fingerprint


@pytest.mark.parametrize("position", [0, 40_000, -1])
def test_fingerprint_of_a_large_binidx(tmp_path, monkeypatch, position):
    monkeypatch.setattr("heron.data.fingerprint._END_BYTES", 1000)
    tokens = np.zeros(80_000, np.uint16)
    write(tmp_path / "a", [tokens], 256)
    tokens[position] = 1
    write(tmp_path / "b", [tokens], 256)
    seen = load(tmp_path / "a").fingerprint != load(tmp_path / "b").fingerprint
    assert seen == (position != 40_000)


def test_batches_are_neighbours_in_the_data(tmp_path):
    tokens = np.arange(1000, dtype=np.uint16)
    batches = Batches(tokens, ctx_len=64, seed=0, kind="text")
    x, y = batches.batch(13, 5)
    assert x.shape == y.shape == (5, 64)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert torch.equal(y, x + 1)
    assert x[:, 0].tolist() == batches.order.starts(13, 5).tolist()
    assert torch.equal(x[2:4], batches.batch(15, 2)[0])


def test_order_follows_kind_and_size():
    tokens = np.zeros(10_000, np.uint16)
    assert Batches(tokens, 64, 0, "binidx").order.prime == 149
    assert Batches(tokens, 64, 0, "text").order.prime is None
    assert Batches(tokens[:700], 64, 5, "binidx").order.prime is None
    assert Batches(tokens[:700], 64, 5, "binidx").order.seed == 5


def test_the_shortest_data():
    x, y = Batches(np.array([3, 4, 5]), 2, 0, "text").batch(7, 1)
    assert (x.tolist(), y.tolist()) == ([[3, 4]], [[4, 5]])
    with pytest.raises(DataError, match="ctx_len 3 needs 4 tokens, the data hold 3"):
        Batches(np.array([3, 4, 5]), 3, 0, "text")
