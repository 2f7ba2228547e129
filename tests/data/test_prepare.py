import io
import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from heron import tokenizer
from heron.data import prepare as preparing
from heron.data.binidx import open_binidx
from heron.data.encode import encode_document
from heron.data.prepare import prepare
from heron.errors import ConfigError, DataError


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def inputs(tmp_path):
    """A text, a jsonl with an empty document, and a folder."""
    (tmp_path / "a.txt").write_text("The Eiffel tower", encoding="utf-8")
    lines = jsonl(tmp_path / "b.jsonl", [f"line {i} é🦩" for i in range(40)] + ["", "last"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "z.txt").write_text("second")
    (tmp_path / "folder" / "a.md").write_text("first")
    return [str(tmp_path / "a.txt"), lines, str(tmp_path / "folder")]


TEXTS = ["The Eiffel tower", *(f"line {i} é🦩" for i in range(40)), "last", "first", "second"]


@pytest.mark.parametrize("spec", ["bytes", "world"])
def test_documents_in_order_each_with_its_end(tmp_path, inputs, spec):
    stats = prepare(inputs, str(tmp_path / "out" / "data"), spec, workers=1)
    pair = open_binidx(tmp_path / "out" / "data")
    documents = np.split(pair.tokens, np.cumsum(pair.sizes)[:-1])
    wanted = [[*tokenizer.load(spec).encode(text), 0] for text in TEXTS]
    assert [document.tolist() for document in documents] == wanted
    assert pair.tokens.dtype == np.uint16
    assert stats.out == tmp_path / "out" / "data.bin"
    assert (stats.documents, stats.empty_documents) == (len(TEXTS), 1)
    assert stats.tokens == sum(map(len, wanted))
    assert stats.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert stats.bytes_per_token == stats.text_bytes / stats.tokens
    assert stats.max_id == max(map(max, wanted))


def test_workers_do_not_change_what_is_written(tmp_path, inputs, monkeypatch):
    monkeypatch.setattr(preparing, "CHUNK_CHARACTERS", 64)
    one = prepare(inputs, str(tmp_path / "one"), "bytes", workers=1)
    two = prepare(inputs, str(tmp_path / "two"), "bytes", workers=2)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    assert str(one).replace("one.bin", "two.bin") == str(two)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_document_is_named_and_nothing_is_left(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(preparing, "CHUNK_CHARACTERS", 8)
    source = jsonl(tmp_path / "a.jsonl", ["some text"] * 6 + ["a\0b"] + ["some text"] * 6)
    with pytest.raises(DataError, match="a.jsonl, line 7: .*NUL .* character 1"):
        prepare([source], str(tmp_path / "data"), "bytes", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_bad_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(DataError, match="a.jsonl, line 2: wanted a string under"):
        prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "data"), "bytes")


def test_statistics_name_the_magic_primes(tmp_path):
    (tmp_path / "a.txt").write_text("x" * (512 * 3000))
    stats = prepare([str(tmp_path / "a.txt")], str(tmp_path / "data"), "bytes")
    assert stats.magic_primes == {512: 2999, 1024: 1499, 2048: 743, 4096: 359}
    assert "1,536,001 tokens of 1 document " in str(stats)
    assert "2999 at 512" in str(stats)
    (tmp_path / "b.txt").write_text("x")
    assert set(prepare([str(tmp_path / "b.txt")], str(tmp_path / "small"), "bytes").magic_primes.values()) == {None}


@pytest.mark.parametrize(
    ("terminal", "progress", "shown"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_progress_is_for_terminals(tmp_path, inputs, monkeypatch, terminal, progress, shown):
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    prepare(inputs, str(tmp_path / "data"), "bytes", progress=progress)
    assert ("encoding" in stderr.getvalue()) == shown


def test_builtin_text(tmp_path):
    stats = prepare(["builtin:python-docs"], str(tmp_path / "docs"), "bytes")
    assert stats.tokens == stats.text_bytes + stats.documents


def test_integers_need_no_end_and_no_spacing(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", ["1 2\n3", " ", "70000 4"])
    stats = prepare([source], str(tmp_path / "plain"), "integers:70001")
    pair = open_binidx(tmp_path / "plain")
    assert (pair.tokens.tolist(), pair.sizes.tolist(), pair.tokens.dtype) == ([1, 2, 3, 70000, 4], [3, 2], np.int32)
    assert stats.empty_documents == 1
    prepare([source], str(tmp_path / "ended"), "integers:70001:9")
    assert open_binidx(tmp_path / "ended").tokens.tolist() == [1, 2, 3, 9, 70000, 4, 9]


@pytest.mark.parametrize("workers", [1, 2])
def test_vocab_size_decides_the_dtype_and_bounds_the_ids(tmp_path, workers):
    (tmp_path / "a.txt").write_text("az")
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "wide"), "bytes", workers, vocab_size=65537)
    assert open_binidx(tmp_path / "wide").tokens.dtype == np.int32
    with pytest.raises(DataError, match=r"a.txt: id 122 \(token 1\) is outside the vocabulary of 122"):
        prepare([str(tmp_path / "a.txt")], str(tmp_path / "narrow"), "bytes", workers, vocab_size=122)


def test_existing_output_is_refused_unless_overwritten(tmp_path):
    (tmp_path / "a.txt").write_text("new")
    (tmp_path / "data.bin").write_bytes(b"old")
    with pytest.raises(DataError, match="data.bin: exists"):
        prepare([str(tmp_path / "a.txt")], str(tmp_path / "data"), "bytes")
    assert (tmp_path / "data.bin").read_bytes() == b"old"
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "data.bin"), "bytes", overwrite=True)
    assert bytes(open_binidx(tmp_path / "data").tokens.astype(np.uint8)) == b"new\0"


@pytest.mark.parametrize("out", [".", "a.txt/data"])
def test_unfit_output(tmp_path, out):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="got a folder|cannot be written"):
        prepare([str(tmp_path / "a.txt")], str(tmp_path / out), "bytes")


@pytest.mark.parametrize(("inputs", "message"), [([], "empty documents: 0"), (["a.jsonl"], "empty documents: 2")])
def test_nothing_to_write(tmp_path, monkeypatch, inputs, message):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(DataError, match=message):
        prepare(inputs, "data", "bytes")


def test_workers_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match="workers"):
        prepare([], str(tmp_path / "data"), "bytes", workers=0)


@pytest.fixture
def lossy(tmp_path):
    """A word tokenizer that knows lower-case a and b, an end token, and nothing else."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<eos>": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["<eos>"])
    words.save(str(tmp_path / "tokenizer.json"))
    return tokenizer.load(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b c", r"here: .* does not give the text back: from character 4 on, wanted 'c', got '\?'"),
        ("a  b", "from character 2 on"),
        ("a <eos> b", r"here: the end of document, id 2, stands inside the text \(token 1\)"),
    ],
)
def test_text_that_does_not_survive_is_refused(lossy, text, message):
    assert encode_document(lossy, "here", "a b", 4).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=message):
        encode_document(lossy, "here", text, 4)


def test_an_end_inside_integers_is_refused():
    with pytest.raises(DataError, match="here: the end of document, id 0, .*token 1"):
        encode_document(tokenizer.load("integers:5:0"), "here", "1 0 2", 5)


def test_import_needs_neither_torch_nor_tokenizer_packages():
    code = (
        "import sys, heron.tokenizer, heron.data, heron.data.prepare\n"
        "print([name for name in ('torch', 'pyrwkv_tokenizer', 'tokenizers', 'rich', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
