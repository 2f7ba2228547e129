import pydoc_data.topics

import pytest

from heron.data import jsonl
from heron.data.corpora import builtin, read_documents
from heron.errors import ConfigError, DataError


def test_python_docs():
    documents = builtin("builtin:python-docs")
    assert documents == [text for _, text in sorted(pydoc_data.topics.topics.items())]
    assert sum(len(text.encode()) for text in documents) > 400_000


def test_python_stdlib():
    documents = builtin("builtin:python-stdlib")
    assert len(documents) > 300
    assert all(documents)
    assert any('"""JSON (JavaScript Object Notation)' in text for text in documents)
    assert not any("class TestCase(unittest.TestCase)" in text for text in documents)
    assert list(read_documents("builtin:python-stdlib"))[9] == ("builtin:python-stdlib, document 10", documents[9])


def test_unknown_builtin():
    with pytest.raises(ConfigError, match="mean 'builtin:python-docs'"):
        builtin("builtin:python-doc")
    with pytest.raises(ConfigError, match="there are builtin:python-docs, builtin:python-stdlib"):
        list(read_documents("builtin:x"))


def test_text_is_read_as_it_is(tmp_path):
    path = tmp_path / "a.text"
    path.write_bytes("é\r\n\u2028\n\n".encode())
    assert list(read_documents(str(path))) == [(str(path), "é\r\n\u2028\n\n")]


def test_jsonl_lines_end_at_newlines_only(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "a\u2028b\u0085c"}', "", " \r", '{"n": 1, "text": "\\u0000\\n\\ud83e\\udda9"}\r', '{"text": ""}']
    path.write_bytes("\n".join(lines).encode())
    assert list(read_documents(str(path))) == [
        (f"{path}, line 1", "a\u2028b\u0085c"),
        (f"{path}, line 4", "\0\n🦩"),
        (f"{path}, line 5", ""),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at position 10"),
        (b'{"text": "a"', "not JSON"),
        (b"plain", "not JSON"),
        (b'\xef\xbb\xbf\xef\xbb\xbf{"text": "a"}', "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'["text"]', "got list"),
        (b'"text"', "got str"),
        (b'{"test": "a"}', "got the keys 'test'"),
        (b"{}", "got no key"),
        (b'{"text": null}', "got NoneType there"),
        (b'{"text": "ab\\ud800"}', r"character 2 of the text is '\\ud800'"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    documents = read_documents(str(path))
    assert next(documents) == (f"{path}, line 1", "good")
    with pytest.raises(DataError, match=f"a.jsonl, line 3: .*{message}"):
        next(documents)


def test_bad_lines_can_be_passed_over_and_are_handed_out(tmp_path):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}'
    path.write_bytes(b"\n".join([b"bad", good, b"", b"\xff", good, b'{"text": 1}']))
    refusals = []
    documents = list(read_documents(str(path), refusals.append))
    assert documents == [(f"{path}, line 2", "good"), (f"{path}, line 5", "good")]
    assert all(isinstance(refusal, DataError) for refusal in refusals)
    assert [str(refusal) for refusal in refusals] == [
        f"{path}, line 1: not JSON: Expecting value at character 0 (the line begins at byte 0)",
        f"{path}, line 4: not UTF-8: byte 0xff at position 0: invalid start byte (the line begins at byte 22)",
        f'{path}, line 6: wanted a string under "text", got int there (the line begins at byte 41)',
    ]


@pytest.mark.parametrize("last", [b"", b"\n", b'\n{"text": "after"}'])
def test_a_line_that_is_too_long_is_refused_and_the_next_one_read(tmp_path, monkeypatch, last):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 20)
    monkeypatch.setattr(jsonl, "_PIECE", 7)
    path = tmp_path / "a.jsonl"
    for extra in range(40):
        line = b'{"text": "' + b"a" * extra + b'"}'
        path.write_bytes(b'{"text": "b"}\n' + line + last)
        refusals = []
        texts = [text for _, text in read_documents(str(path), refusals.append)]
        wanted = ["b", *(["a" * extra] if len(line) <= 20 else []), *(["after"] if b"after" in last else [])]
        assert texts == wanted, extra
        assert len(refusals) == (len(line) > 20)
    assert "line 2: wanted at most 20 bytes in a line, got more" in str(refusals[0])
    assert "begins at byte 14" in str(refusals[0])


@pytest.mark.parametrize(("data", "place"), [(b"ab\n\nc\xe9d", r"position 5 \(line 3\)"), (b"\x80", "position 0:")])
def test_text_that_is_not_utf8(tmp_path, data, place):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=f"a.txt: not UTF-8: byte 0x.. at {place}"):
        list(read_documents(str(tmp_path / "a.txt")))


def test_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.txt", "a-b.txt", "a/skipped.py", "B.TXT.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.jsonl").write_text('{"text": "c1"}\n{"text": "c2"}\n')
    texts = [text for _, text in read_documents(str(tmp_path))]
    assert texts == ["a-b.txt", "a/b/c.txt", "a/z.md", "b.txt", "c1", "c2"]


def test_folder_without_text(tmp_path):
    with pytest.raises(DataError, match=r"wanted a folder with \.txt"):
        list(read_documents(str(tmp_path)))


def test_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "corpus.txt").write_text("a")
    with pytest.raises(DataError, match="no such file or folder. Did you mean 'corpus.txt'"):
        list(read_documents(str(tmp_path / "corpus.text")))
    with pytest.raises(DataError, match="no such file or folder"):
        list(read_documents(str(tmp_path / "nowhere" / "x.txt")))
