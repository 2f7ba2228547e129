"""What a file is decides its content as well as its name; a folder gives its data and nothing else."""

import bz2
import csv
import gzip
import json
import lzma
import os

import pytest

from heron.data import corpora, jsonl
from heron.data.corpora import PLAIN, Reading, read_documents, text_files
from heron.data.prepare import prepare
from heron.errors import ConfigError, DataError

TEXTS = [f"Document {i}, é🦩." for i in range(30)]
ROWS = [{"id": i, "text": text, "score": [0.5]} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FOREIGN_TEXT = "[Chorus]\n{la la}\n"


def texts_of(path, reading=PLAIN, **options):
    return [text for _, text in read_documents(str(path), reading=reading, **options)]


def written(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "A.JSONL", "part-0001", "a.txt", "a.jsonl.1"])
@pytest.mark.parametrize(
    "data",
    [LINES, b"\n" + LINES, LINES.rstrip(), b"\xef\xbb\xbf" + LINES, json.dumps(ROWS), json.dumps(ROWS, indent=1)],
    ids=["lines", "blank first", "no newline last", "byte order mark", "array", "array over lines"],
)
def test_rows_of_json_are_known_by_their_content(tmp_path, name, data):
    assert texts_of(written(tmp_path / name, data)) == TEXTS


@pytest.mark.parametrize(
    "data",
    ["\n".join(json.dumps(row, indent=2) for row in ROWS), "".join(json.dumps(row, indent=2) for row in ROWS)],
    ids=["as jq writes", "without a newline between"],
)
def test_objects_over_several_lines(tmp_path, data):
    assert texts_of(written(tmp_path / "a.json", data)) == TEXTS


@pytest.mark.parametrize("text", [FOREIGN_TEXT, '{"a": 1}\n', '["text"]', "{", "", '{"text": 1}\n', '[{"text": 5}]'])
def test_what_only_looks_like_rows_is_text(tmp_path, text):
    assert texts_of(written(tmp_path / "a.txt", text)) == [text]


def test_reading_rows_otherwise_than_the_name_says_is_told(tmp_path):
    said = []
    texts_of(written(tmp_path / "a.txt", LINES), say=said.append)
    assert len(said) == 1
    assert "a.txt: holds rows of JSON; the 'text' of each is read" in said[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", {"data": ROWS}, r"the keys 'data' \(list of 30\).*jq -c '.\[\"data\"\]\[\]'"),
        ("a.json", {"text": TEXTS}, 'wanted a string under "text", got list of 30 there'),
        ("a.json", {"text": {"0": "a"}}, "got dict of 1 there"),
        ("a.json", [{"content": "a"}], "row 1: wanted a string.*the keys 'content'; --column NAME"),
        ("a.json", ["a", "b"], "row 1: wanted an object, got str"),
        ("a.json", "plain", "line 1: wanted an object, got str"),
        ("a.json", 5, "line 1: wanted an object, got int"),
        ("a.jsonl", [{"content": "a"}], "row 1: wanted a string"),
    ],
)
def test_json_without_rows_says_what_was_found(tmp_path, name, content, message):
    for indent in (None, 1) if name == "a.json" else (None,):
        with pytest.raises(DataError, match=f"{name}, .*{message}"):
            texts_of(written(tmp_path / name, json.dumps(content, indent=indent)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"text": "a"}, {"text": "b"}', "row 3: the array has no end"),
        (b'[{"text": "a"}, {"text": "b', "row 2: not JSON: Unterminated string"),
        (b'[{"text": "a"},]', "row 2: not JSON"),
        (b'[{"text": "a"},', "row 2: the array has no end"),
        (b'[{"text": "a"} {"text": "b"}]', "row 2: wanted , or ]"),
        (b'[{"text": "a"}] x', "row 2: something follows the array"),
        (b'[{"text": "a"}, {"text": "\xff"}]', "row 1: not UTF-8: byte 0xff at position 26"),
        (b'[{"text": "a"}, {"text": ' + b"[" * 5000, "row 2: not JSON: nested"),
    ],
)
@pytest.mark.parametrize("piece", [1 << 20, 5])
def test_a_broken_array_is_refused_even_where_rows_may_be_skipped(tmp_path, monkeypatch, data, message, piece):
    monkeypatch.setattr(jsonl, "_PIECE", piece)
    message = message.replace("row 1: not UTF-8", "row .: not UTF-8")
    with pytest.raises(DataError, match=f"a.json, {message}.*nothing can be read"):
        texts_of(written(tmp_path / "a.json", data), on_bad_line=lambda error: None)


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_an_array_is_read_piece_by_piece(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(jsonl, "_PIECE", piece)
    path = written(tmp_path / "a.json", json.dumps(ROWS, ensure_ascii=False, indent=1).encode())
    assert texts_of(path) == TEXTS
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 50)
    long = written(tmp_path / "b.json", json.dumps([{"text": "a"}, {"text": "b" * 3000}]))
    with pytest.raises(DataError, match="row 2: wanted at most 50 characters"):
        texts_of(long)


def test_bad_rows_of_an_array_can_be_passed_over(tmp_path):
    refusals = []
    path = written(tmp_path / "a.json", json.dumps([{"text": "a"}, 5, {"text": None}, {"text": "b"}]))
    assert texts_of(path, on_bad_line=refusals.append) == ["a", "b"]
    assert [str(error).partition("a.json, ")[2][:6] for error in refusals] == ["row 2:", "row 3:"]


# -- fields that are not used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rest",
    ["NaN", "-Infinity", "1e999", "9" * 6000, '"\\ud800"', '{"b": 1, "b": NaN}', "[" * 400 + "]" * 400, "0"],
    ids=lambda rest: rest[:9],
)
@pytest.mark.parametrize("form", ['{"text": "good", "a": REST}', '{"a": 0, "a": REST, "text": "good"}'])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_field_that_is_not_used_can_be_anything_that_python_writes(tmp_path, rest, form, name):
    row = form.replace("REST", rest)
    path = written(tmp_path / name, f"{row}\n{row}\n" if name == "a.jsonl" else f"[{row}, {row}]")
    assert texts_of(path) == ["good", "good"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": NaN}', "NaN"),
        ('{"text": "a", "text": "b"}', "'text' comes twice"),
        ('{"text": "a", "x": %s}' % ("[" * 600 + "]" * 600), "nested more than"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_the_field_that_is_used_is_strict(tmp_path, row, message):
    with pytest.raises(DataError, match=f"a.jsonl, line 1: .*{message}"):
        texts_of(written(tmp_path / "a.jsonl", row))


# -- packed, marked, wide -------------------------------------------------------------------------------------------

PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "A.JSON", "a.csv", "a"])
def test_packed_files(tmp_path, packer, name):
    data = {"a.txt": "héllo\n".encode(), "A.JSON": json.dumps(ROWS).encode(), "a.csv": b"text\nb\n"}.get(name, LINES)
    wanted = {"a.txt": ["héllo\n"], "a.csv": ["b"]}.get(name, TEXTS)
    assert texts_of(written(tmp_path / f"{name}.{packer}", PACKERS[packer](data))) == wanted
    assert texts_of(written(tmp_path / name, PACKERS[packer](data))) == wanted  # known by its content alone
    with pytest.raises(DataError, match="cut short|cannot be read"):
        texts_of(written(tmp_path / f"torn-{name}.{packer}", PACKERS[packer](data)[:-9]))


def test_members_one_after_another_and_damage(tmp_path):
    half = LINES.index(b"\n", 900) + 1
    both = gzip.compress(LINES[:half]) + gzip.compress(LINES[half:])
    assert texts_of(written(tmp_path / "a.jsonl.gz", both)) == TEXTS
    damaged = bytearray(both)
    damaged[40] ^= 0xFF
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        texts_of(written(tmp_path / "a.jsonl.gz", bytes(damaged)))
    assert texts_of(written(tmp_path / "b.txt.gz", b"unpacked on the way")) == ["unpacked on the way"]


@pytest.mark.parametrize(
    ("name", "head", "command"),
    [
        ("a b.jsonl.zst", b"\x28\xb5\x2f\xfd", "Zstandard.*zstd -d '.*a b.jsonl.zst'"),
        ("a.docx", b"PK\x03\x04", "zip.*unzip"),
        ("a.tar", b"a.txt" + b"\0" * 252 + b"ustar\x0000", "tar archive.*tar xf"),
        ("a.pdf", b"%PDF-1.7\n", "pdftotext"),
        ("a b.arrow", b"ARROW1\0\0", r"python -c '[^']+' '[^']*a b\.arrow'$"),
        ("a.txt", "héllo\nworld".encode("utf-16"), "UTF-16.*iconv -f UTF-16 -t UTF-8"),
        ("a.jsonl", LINES.decode().encode("utf-16-le"), "UTF-16LE.*iconv"),
        ("a.csv", "\ufefftext\nab\n".encode("utf-16-be"), "UTF-16.*iconv"),
        ("a.txt", "héllo".encode("utf-32"), "UTF-32"),
    ],
)
def test_what_must_be_unpacked_or_converted_first_says_how(tmp_path, name, head, command):
    with pytest.raises(DataError, match=command):
        texts_of(written(tmp_path / name, head))
    if name == "a.tar":
        with pytest.raises(DataError, match=command):
            texts_of(written(tmp_path / "a.tar.gz", gzip.compress(head)))


@pytest.mark.parametrize("text", ["Once upon a time.\n", "", "\ufeffsecond stays"])
def test_a_byte_order_mark_at_the_head_is_left_out(tmp_path, text):
    data = b"\xef\xbb\xbf" + text.encode()
    assert texts_of(written(tmp_path / "a.txt", data)) == [text]
    assert texts_of(written(tmp_path / "a.txt", data + b"|"), Reading(split_at="|")) == ([text] if text else [])
    assert texts_of(written(tmp_path / "a.csv", "\ufefftext\nb\n")) == ["b"]
    assert texts_of(written(tmp_path / "a.jsonl.gz", gzip.compress(b'\xef\xbb\xbf{"text": "a"}\n'))) == ["a"]


# -- tables ---------------------------------------------------------------------------------------------------------


def table(path, rows, **options):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows(rows)
    return path


HARD = ['He said "no",\nand left', "é🦩", "", "a;b\tc|d", "x" * 200_000, "plain"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv(tmp_path, delimiter):
    path = table(tmp_path / "a.csv", [["id", "story"], *enumerate(HARD)], delimiter=delimiter)
    assert texts_of(path, Reading(column="story")) == HARD
    if delimiter == "\t":
        assert texts_of(path.rename(tmp_path / "a.tsv"), Reading(column="story")) == HARD


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"id,story\n1,a\n", "column 'text' is not there; the first row names 'id', 'story'. --column NAME"),
        (b"text,text\na,b\n", "column 'text' comes twice"),
        (b"", "is not there; the first row names none"),
        (b"id,text\n1,a,b\n", "line 2: wanted 2 fields, as the first row has, got 3"),
        (b'id,text\n1,"a\n2,b\n', "not csv: unexpected end"),
        (b"id,text\n1,a\n2,\xff\n", "line 3: not UTF-8: byte 0xff at position 2 of the line"),
    ],
)
def test_csv_that_cannot_be_used(tmp_path, data, message):
    with pytest.raises(DataError, match=f"a.csv.*{message}"):
        texts_of(written(tmp_path / "a.csv", data))


def test_csv_rows_can_be_skipped(tmp_path):
    refusals = []
    path = written(tmp_path / "a.csv", "\nid,text\n1,a\n\n2,b,c\n3,d\n")
    assert list(read_documents(str(path), refusals.append)) == [(f"{path}, line 3", "a"), (f"{path}, line 6", "d")]
    assert "line 5: wanted 2 fields" in str(refusals[0])


def test_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    columns = {"id": list(range(30)), "story": TEXTS, "tag": pyarrow.array(TEXTS).dictionary_encode()}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    assert texts_of(path, Reading(column="story")) == texts_of(path, Reading(column="tag")) == TEXTS
    with pytest.raises(DataError, match="'text' is not there; the first row names 'id', 'story', 'tag'"):
        texts_of(path)
    with pytest.raises(DataError, match="wanted text in column 'id', got int64"):
        texts_of(path, Reading(column="id"))
    parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: .*got nothing"):
        texts_of(path)
    assert texts_of(path, on_bad_line=lambda error: None) == ["a", "b"]
    said = []
    assert texts_of(written(tmp_path / "a.txt", path.read_bytes()), say=said.append, on_bad_line=said.append)
    assert "a.txt: holds rows of parquet" in said[0]
    with pytest.raises(DataError, match=r"b\.parquet\.gz: is a parquet inside a packed file; unpack it first"):
        texts_of(written(tmp_path / "b.parquet.gz", gzip.compress(path.read_bytes())))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet.*parquet"):
        texts_of(path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match="pip install 'heron-rwkv\\[parquet\\]'"):
        texts_of(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_the_column_names_the_field_of_any_rows(tmp_path, name):
    path = tmp_path / name
    if name == "a.csv":
        table(path, [["id", "content"], *enumerate(TEXTS)])
    else:
        rows = [{"content": text} for text in TEXTS]
        written(path, json.dumps(rows) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert texts_of(path, Reading(column="content")) == TEXTS


# -- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Data of every kind, beside what is none."""
    root = tmp_path / "data"
    for name in ("a.txt", "B.TXT", "c.md", "deep/er/d.txt"):
        written(root / name, name)
    written(root / "e.jsonl.gz", gzip.compress(b'{"text": "e"}\n'))
    written(root / "f.json", '[{"text": "f"}]')
    written(root / "g.csv", "text\ng\n")
    written(root / "run/run.lock", "")
    written(root / "run/log.jsonl", '{"step": 1}\n')
    written(root / "run/samples/step-1.txt", "sampled")
    written(root / "old run/config.yaml", "")
    written(root / "old run/log.jsonl", '{"step": 1}\n')
    written(root / "official/train_log.txt", "1.0")
    written(root / "official/rwkv-init.pth", "")
    written(root / "hf/config.json", "{}")
    written(root / "hf/model.safetensors", "")
    written(root / "hf/merges.txt", "a b")
    written(root / "adapter/adapter_config.json", "{}")
    written(root / "adapter/adapter_model.safetensors", "")
    written(root / "adapter/README.md", "a card")
    written(root / "venv/pyvenv.cfg", "")
    written(root / "venv/lib/LICENSE.txt", "not data")
    written(root / "node_modules/x/README.md", "not data")
    written(root / ".git/description.txt", "hidden")
    written(root / "deep/.ipynb_checkpoints/a-checkpoint.txt", "hidden")
    written(root / "deep/._a.txt", "hidden")
    written(root / "tokenizer.json", '{"model": {}}')
    written(root / "h.csv", "id,other\n1,2\n")
    written(root / "i.py", "print()")
    written(root / "j", "no suffix")
    written(root / "k.pdf", "%PDF-")
    os.symlink(root, root / "deep/loop")
    os.symlink(root / "nowhere.txt", root / "broken.txt")
    return root


DATA = ["B.TXT", "a.txt", "c.md", "deep/er/d.txt", "e", "f", "g"]


def test_a_folder_gives_its_data_and_says_what_it_passed_over(folder):
    said = []
    assert texts_of(folder, say=said.append) == DATA
    (line,) = said
    for part in (
        "reads 7 files; passed over: ", "runs (3)", "models (2)", "hidden ones (3)", ".py (1)", ".pdf (1)",
        "without suffix (1)", "virtual environments and packages (2)",
        "not what their names say (2)", "folders that are read under another name (1)",
        "neither files nor folders (1)", '--glob "*.py', "h.csv: column 'text' is not there",
    ):  # fmt: skip
        assert part in line, line


def test_a_link_to_a_folder_elsewhere_is_followed_once(folder, tmp_path):
    written(tmp_path / "elsewhere/z.txt", "z")
    os.symlink(tmp_path / "elsewhere", folder / "deep/link")
    os.symlink(tmp_path / "elsewhere", folder / "link again")
    assert sorted(texts_of(folder)) == sorted([*DATA, "z"])


def test_a_folder_that_is_a_run_itself_leaves_its_own_files_out(folder):
    for name in ("run.lock", "config.yaml", "log.jsonl", "train_log.txt", "samples/step-1.txt", "checkpoints/x.txt"):
        written(folder / name, "own")
    assert texts_of(folder) == DATA


@pytest.mark.parametrize(
    ("glob", "wanted"),
    [
        ("*.py", ["print()"]),
        ("*.py,*.md", ["c.md", "print()"]),
        ("deep/**/*.txt", ["deep/er/d.txt"]),
        ("**/*.py", ["print()"]),
        ("./*.jsonl.gz", ["e"]),
        ("j", ["no suffix"]),
    ],
)
def test_glob_chooses(folder, glob, wanted):
    assert texts_of(folder, Reading(glob=glob)) == wanted


@pytest.mark.parametrize(("glob", "message"), [("*.rs", r"files that match \*.rs, found none"), ("*.{a,b}", "braces")])
def test_glob_that_chooses_nothing(folder, glob, message):
    with pytest.raises((DataError, ConfigError), match=message):
        texts_of(folder, Reading(glob=glob))


def test_a_folder_of_packed_files_says_to_unpack_them(tmp_path):
    written(tmp_path / "d/a.jsonl.zst", "x")
    with pytest.raises(DataError, match=r"passed over: .zst \(1\).*unpack .zst first"):
        texts_of(tmp_path / "d")


def test_settings_that_mean_nothing_here_are_told(tmp_path):
    path = written(tmp_path / "a.txt", "text")
    for reading, message in [(Reading(glob="*.py"), "is a file"), (Reading(column="x"), "is text")]:
        with pytest.warns(UserWarning, match=message):
            texts_of(path, reading)
    for name in ("column", "glob", "split_at"):
        with pytest.raises(ConfigError, match=f"{name}: wanted at least one character"):
            Reading(**{name: ""})


def test_what_prepare_leaves_in_the_folder_is_not_read_and_changes_no_job(folder):
    reading = Reading(glob="*")
    for name in ("j", "k.pdf"):
        (folder / name).unlink()
    before = text_files(str(folder), reading)
    for name in ("o.bin.part", "o.progress.part", "o.bin", "o.idx", "o.checks.json", "o.skipped.log"):
        written(folder / name, "x")
    assert text_files(str(folder), reading) == before


@pytest.mark.parametrize(("source", "message"), [("", "got an empty text"), ("texts/*.txt", r"--glob '\*.txt'")])
def test_sources_that_shells_hand_on(source, message):
    with pytest.raises(DataError, match=message):
        texts_of(source)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is a pipe or device; write it to a file"):
        texts_of(tmp_path / "pipe")


# -- cuts -----------------------------------------------------------------------------------------------------------

MARK = corpora.END_MARK
STORIES = [f"Once there was story {i}.\n" for i in range(60)]


@pytest.mark.parametrize(
    "text",
    [
        MARK.join(STORIES),
        f"{MARK}\n".join(STORIES),
        f"{MARK}\r\n".join(STORIES),
        f"{MARK}\n" + f"{MARK}\n".join(STORIES) + f"{MARK}\n",
        f"{MARK}{MARK}".join(STORIES) + f"{MARK}\n",
    ],
    ids=["joined", "lines", "crlf", "at the ends", "twice"],
)
@pytest.mark.parametrize("piece", [1, 3, 20, 1 << 20])
def test_texts_are_cut_at_the_mark(tmp_path, monkeypatch, text, piece):
    monkeypatch.setattr(corpora, "_PIECE", piece)
    path = written(tmp_path / "a.txt", text)
    assert texts_of(path, Reading(split_at=MARK)) == STORIES
    rows = written(tmp_path / "a.jsonl", json.dumps({"text": text}))
    assert texts_of(rows, Reading(split_at=MARK)) == STORIES


def test_one_newline_behind_the_mark_goes_with_it(tmp_path):
    path = written(tmp_path / "a.txt", f"a{MARK}\nb\n{MARK}\n\nc")
    assert texts_of(path, Reading(split_at=MARK)) == ["a", "b\n", "\nc"]
    assert texts_of(written(tmp_path / "b.txt", "a\nb\r\n\nc"), Reading(split_at="\\n")) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("mark", "text", "parts"),
    [
        ("\\n", "a\r\nb\r\n\r\nc\r\n", ["a", "b", "c"]),
        ("\n", "a\r\nb\n", ["a", "b"]),
        ("\\n\\n", "a\r\nb\r\n\r\nc\n\nd", ["a\r\nb", "c", "d"]),
        ("\\n---\\n", "a\r\n---\r\nb\n---\n\nc", ["a", "b", "c"]),
        ("\\r\\n", "a\r\nb\nc", ["a", "b\nc"]),
        ("\\t", "a\tb\\t", ["a", "b\\t"]),
    ],
)
@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 20])
def test_a_newline_in_the_mark_is_that_of_any_system(tmp_path, monkeypatch, mark, text, parts, piece):
    monkeypatch.setattr(corpora, "_PIECE", piece)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert texts_of(path, Reading(split_at=mark)) == parts


def test_files_that_are_no_text_can_be_passed_over(tmp_path):
    (tmp_path / "a.py").write_text("first")
    (tmp_path / "b.py").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "c.py").write_bytes("wide text".encode("utf-16"))
    (tmp_path / "d.py").write_bytes(b"PK\x03\x04 and so on")
    (tmp_path / "e.py").write_bytes(b"good" + MARK.encode() + b"\xe9" + MARK.encode() + b"last")
    refusals = []
    reading = Reading(glob="*.py", split_at=MARK)
    assert texts_of(tmp_path, reading, on_bad_line=refusals.append) == ["first", "good", "last"]
    assert [str(error).partition(".py")[0][-1] for error in refusals] == ["b", "c", "d", "e"]
    assert "not UTF-8" in str(refusals[0])
    assert "e.py, part 2" in str(refusals[3])
    refusals.clear()
    assert texts_of(tmp_path, Reading(glob="[abe].py"), on_bad_line=refusals.append) == ["first"]
    assert len(refusals) == 2
    with pytest.raises(DataError, match="b.py: not UTF-8: .*iconv.*--on_bad_line skip"):
        texts_of(tmp_path, Reading(glob="*.py"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a"])
def test_byte_order_marks_of_files_that_were_put_together_are_left_out(tmp_path, name):
    row = '\ufeff{"text": "a"}\n'
    assert texts_of(written(tmp_path / name, row + row + '{"text": "b"}\n' + row)) == ["a", "a", "b", "a"]


def test_marks_that_are_not_cut_at_and_cuts_without_a_mark_are_told(tmp_path):
    path = written(tmp_path / "a.txt", MARK.join(STORIES))
    with pytest.warns(UserWarning, match=r"59 times up to here.*--split_at '<\|endoftext\|>'"):
        texts_of(path)
    with pytest.warns(UserWarning, match="split_at '###' stands nowhere in it"):
        texts_of(path, Reading(split_at="###"))


@pytest.mark.parametrize("spec", ["world", "bytes"])
def test_prepare_ends_each_part(tmp_path, spec):
    path = written(tmp_path / "a.txt", f"{MARK}\n".join(STORIES) + MARK)
    stats = prepare([str(path)], str(tmp_path / "o"), spec, 1, reading=Reading(split_at=MARK))
    assert (stats.documents, stats.empty_documents, stats.text_bytes) == (60, 0, sum(map(len, STORIES)))


def test_questions_may_be_packed_and_an_array_and_hold_any_other_field(tmp_path):
    row = '{"question": "2+2=", "choices": ["4", "5"], "answer": 0, "score": NaN}'
    question = lambda row: (row["question"], row["answer"])  # noqa: E731
    for name, data in [("q.jsonl", row), ("q.json", f"[{row}]"), ("q.jsonl.gz", gzip.compress(row.encode()))]:
        path = written(tmp_path / name, data)
        assert [found for _, found in jsonl.read(path, question)] == [("2+2=", 0)]
    path = written(tmp_path / "twice.jsonl", row.replace('"score"', '"answer"'))
    with pytest.raises(DataError, match="'answer' comes twice"):
        list(jsonl.read(path, question))
