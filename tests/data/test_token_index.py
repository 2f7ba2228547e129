"""An index of documents on disk finds what the definition says, and where it stands; other files are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from heron import tokenizer
from heron.data import binidx, mapped, recalled, token_index
from heron.data.binidx import open_binidx
from heron.data.corpora import Reading, read_documents
from heron.data.token_index import build, describe, read
from heron.errors import CheckpointError, ConfigError, DataError, KernelError
from heron.ops import _build
from heron.ops.rosa import memory
from heron.ops.rosa.memory import TokenIndex

BYTES = tokenizer.load("bytes")
pytestmark = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def folder(tmp_path):
    """Documents of several kinds, one of them empty."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.txt").write_text("the cat sat on the mat")
    (tmp_path / "docs/b.md").write_text("é the dog sat on the log")
    (tmp_path / "docs/c.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("the mat", "", "on the")))
    return str(tmp_path / "docs")


@pytest.fixture
def docs(tmp_path, folder):
    build(tmp_path / "docs.memory", [folder], BYTES)
    return tmp_path / "docs.memory"


def ids_of(folder):
    return [np.append(BYTES.encode_array(text), 0) for _, text in read_documents(folder) if text]


def definition(inside, outside, max_match, end):
    """The latest position of the longest suffix of `outside`, but the last of `inside`, and that length."""
    best = (0, -1)
    for j in range(len(inside) - 1):
        n = 0
        while n < min(max_match, j + 1, len(outside)) and inside[j - n] == outside[-1 - n]:
            if n and inside[j - n] == end:
                break
            n += 1
        best = max(best, (n, j if n else -1))
    return best[::-1]


@pytest.mark.parametrize(("max_match", "across"), [(64, True), (4, True), (64, False)])
def test_it_finds_what_the_definition_says(tmp_path, folder, max_match, across, monkeypatch):
    monkeypatch.setattr(token_index, "PIECE", 7)
    build(tmp_path / "docs.memory", [folder], BYTES, max_match, across)
    found = read(tmp_path / "docs.memory", BYTES)
    tokens = np.concatenate(ids_of(folder))
    assert (found.n_tokens, found.n_documents, found.max_match) == (len(tokens), 4, max_match)
    assert np.array_equal(found.index.parts[0].numpy(), tokens)
    outside = torch.tensor(list(b"a dog on the mat\0the mat\0on the lo"))
    src, length = found.index.find(outside, len(outside))
    wanted = [definition(tokens, outside[: i + 1], max_match, None if across else 0) for i in range(len(outside))]
    assert list(zip(src[:, 0].tolist(), length[:, 0].tolist(), strict=True)) == wanted
    in_memory = TokenIndex.of(torch.tensor(tokens.astype(np.int64)), max_match, None if across else 0)
    for one, other in zip(
        in_memory.find(outside, len(outside), 3), found.index.find(outside, len(outside), 3), strict=True
    ):
        assert torch.equal(one, other)


def test_it_says_in_which_document_a_token_stands_and_where(docs, folder):
    found, position = read(docs, BYTES), 0
    names = [f"{folder}/a.txt", f"{folder}/b.md", f"{folder}/c.jsonl, line 1", f"{folder}/c.jsonl, line 3"]
    for name, ids in zip(names, ids_of(folder), strict=True):
        assert [found.document_of(position + i) for i in range(len(ids))] == [(name, i) for i in range(len(ids))]
        position += len(ids)
    for outside in (-1, position):
        with pytest.raises(IndexError):
            found.document_of(outside)


def test_a_binidx_and_several_sources_become_one_index(tmp_path, folder):
    binidx.write(tmp_path / "data", [[7, 8, 9, 0], [], [8, 9]], 256)
    build(tmp_path / "x.memory", [str(tmp_path / "data"), folder], BYTES)
    found = read(tmp_path / "x.memory", BYTES)
    assert found.n_documents == 6
    assert found.document_of(5) == (f"{tmp_path}/data, document 3", 1)
    assert found.document_of(6) == (f"{folder}/a.txt", 0)
    binidx.write(tmp_path / "wide", [[7, 300]], 65536)
    with pytest.raises(DataError, match="id 300 at position 1 is outside the vocabulary of 256"):
        build(tmp_path / "y.memory", [str(tmp_path / "wide")], BYTES)


@pytest.mark.parametrize(("spec", "width"), [("integers:65536", 10), ("integers:65537", 12)])
def test_it_takes_at_most_12_bytes_a_token_beside_names(tmp_path, spec, width):
    rng = np.random.default_rng(0)
    (tmp_path / "ids.txt").write_text(" ".join(map(str, rng.integers(0, 65536, 20_000))))
    build(tmp_path / "x.memory", [str(tmp_path / "ids.txt")], tokenizer.load(spec))
    roots = 4 * memory.N_ROOTS
    assert (tmp_path / "x.memory").stat().st_size - roots < 20_000 * width + 1000
    index = read(tmp_path / "x.memory", tokenizer.load(f"{spec}:5")).index  # another end, the same ids
    ids = index.parts[0].numpy().astype(np.int64)
    assert index.find(torch.tensor(ids[100:164]), 1)[0].tolist() == [[163]]


def test_documents_are_read_as_prepare_reads_them(tmp_path):
    (tmp_path / "a.csv").write_text("story\none;two\n")
    reading = Reading(column="story", split_at=";")
    build(tmp_path / "x.memory", [str(tmp_path / "a.csv")], BYTES, reading=reading)
    assert read(tmp_path / "x.memory", BYTES).document_of(4)[0].endswith("part 2")


def test_one_token_is_an_index_that_finds_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("7")
    build(tmp_path / "x.memory", [str(tmp_path / "a.txt")], tokenizer.load("integers:9"))
    src, length = read(tmp_path / "x.memory", tokenizer.load("integers:9")).index.find(torch.tensor([7]), 1)
    assert (src.item(), length.item()) == (-1, 0)


def test_names_that_are_no_text_come_back(tmp_path):
    name = b"\xff.txt".decode("utf-8", errors="surrogateescape")
    (tmp_path / name).write_text("abc")
    build(tmp_path / "x.memory", [str(tmp_path / name)], BYTES)
    assert read(tmp_path / "x.memory", BYTES).document_of(0) == (str(tmp_path / name), 0)


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["world", "integers:256", "bytes as a file"])
def test_another_tokenizer_is_refused(docs, tmp_path, other):
    if other == "bytes as a file":
        other = str(tmp_path / "tokenizer.json")
        (tmp_path / "tokenizer.json").write_text(tokenizer.learn_bpe(["some text"], 257))
    with pytest.raises(DataError, match=rf"with the tokenizer bytes \(256 ids, .*\), not with {other} .*memory build"):
        read(docs, tokenizer.load(other))
    with pytest.raises(DataError, match="not with"):
        describe(docs, tokenizer.load(other))


def test_a_tokenizer_file_is_the_same_wherever_it_lies_and_not_with_another_token(tmp_path, folder):
    content = tokenizer.learn_bpe(["the cat sat on the mat"], 260)
    specs = [str(tmp_path / name) for name in ("a.json", "b.json", "c.json")]
    changed = json.loads(content)
    vocabulary = changed["model"]["vocab"]
    one, other = list(vocabulary)[40:42]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    for spec, text in zip(specs, (content, json.dumps(json.loads(content)), json.dumps(changed)), strict=True):
        (tmp_path / spec).write_text(text)
    build(tmp_path / "x.memory", [folder], tokenizer.load(specs[0]))
    read(tmp_path / "x.memory", tokenizer.load(specs[1]))
    with pytest.raises(DataError, match="not with"):
        read(tmp_path / "x.memory", tokenizer.load(specs[2]))


def test_a_missing_a_foreign_and_a_damaged_file_are_refused(docs, tmp_path):
    with pytest.raises(DataError, match="no such file; type heron memory build"):
        read(tmp_path / "none.memory", BYTES)
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path, BYTES)
    content = docs.read_bytes()
    other = content[:12] + b"\2" + content[13:]
    for damaged, told in (
        (b"", "is no memory of documents"),
        (b"some text" * 100, "is no memory of documents"),
        (recalled.KIND.magic + content[12:], "is no memory of documents"),
        (content[:20], "cut short"),
        (content[: len(content) // 2], "cut short"),
        (content[:-1], "cut short"),
        (content + b"x", "longer"),
        (other, "wanted version 1 of a memory of documents, got 2"),
        (content[:-9] + b"?" + content[-8:], "its header is not what its sha256 says: damaged"),
    ):
        docs.write_bytes(damaged)
        for reader in (read, describe):
            with pytest.raises(DataError, match=told):
                reader(docs, BYTES)


def test_a_flipped_bit_anywhere_is_refused_or_found_by_verify(docs):
    content = docs.read_bytes()
    for at in (*range(64), *range(64, len(content), 97), len(content) - 1):
        flipped = bytearray(content)
        flipped[at] ^= 4
        docs.write_bytes(flipped)
        with pytest.raises(DataError):
            describe(docs, verify=True)
    docs.write_bytes(content)
    assert describe(docs, BYTES, verify=True).endswith("compared, all right")


def test_nodes_that_point_nowhere_are_refused_when_they_are_met(docs):
    content, found = bytearray(docs.read_bytes()), read(docs, BYTES)
    nodes = bytes(found.index.parts[1].numpy().tobytes())
    at = bytes(content).index(nodes)
    content[at : at + len(nodes)] = b"\xf0" * len(nodes)
    docs.write_bytes(content)
    damaged = read(docs, BYTES)
    with pytest.raises(KernelError, match="damaged; build it anew"):
        damaged.index.find(torch.tensor(list(b"the cat sat on the mat")), 22)


def test_what_heron_did_not_write_is_not_replaced(tmp_path, folder, docs):
    before = docs.read_bytes()
    build(docs, [f"{folder}/a.txt"], BYTES)
    assert docs.read_bytes() != before
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"mine.txt: is there already and was not written by this command"):
        build(tmp_path / "mine.txt", [folder], BYTES)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_an_interrupted_write_leaves_what_was_there(tmp_path, folder, docs, monkeypatch):
    before = docs.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped.os, "fsync", full)
    for path in (docs, tmp_path / "new.memory"):
        with pytest.raises(CheckpointError, match="No space left"):
            build(path, [f"{folder}/a.txt"], BYTES)
    assert docs.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs", "docs.memory"]


def test_nothing_to_read_and_what_cannot_be_is_told_before_reading(tmp_path, folder, monkeypatch):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty.txt: no text is in it"):
        build(tmp_path / "x.memory", [str(tmp_path / "empty.txt")], BYTES)
    with pytest.raises(ConfigError, match="no id ends a document"):
        build(tmp_path / "x.memory", [folder], tokenizer.load("integers:9"), across_documents=False)
    with pytest.raises(ConfigError, match="max_match: wanted a whole number from 1 to 65535, got 0"):
        build(tmp_path / "x.memory", [folder], BYTES, 0)
    monkeypatch.setattr(_build, "find_compiler", lambda: None)
    monkeypatch.setattr(_build, "load_c_library", lambda *_: (_ for _ in ()).throw(KernelError("no C++ compiler")))
    memory.library.cache_clear()
    try:
        with pytest.raises(KernelError, match=r"no C\+\+ compiler"):
            build(tmp_path / "x.memory", [folder], BYTES)
    finally:
        memory.library.cache_clear()
    assert not (tmp_path / "x.memory").exists()


def test_documents_without_an_end_are_told(tmp_path):
    binidx.write(tmp_path / "data", [[1, 2], [3]], 9)
    with pytest.warns(UserWarning, match="no id ends a document"):
        build(tmp_path / "x.memory", [str(tmp_path / "data")], tokenizer.load("integers:9"))
    assert (
        open_binidx(tmp_path / "data").doc_count
        == read(tmp_path / "x.memory", tokenizer.load("integers:9")).n_documents
    )
