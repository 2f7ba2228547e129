import contextlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heron.data.binidx import BinidxWriter, is_binidx, open_binidx, write
from heron.errors import DataError

DOCUMENTS = [[5, 6, 0], [7, 0]]


@pytest.fixture
def prefix(tmp_path):
    """A sound pair: two documents of uint16."""
    write(tmp_path / "data", DOCUMENTS, vocab_size=65536)
    return tmp_path / "data"


def edited(path, position, replacement):
    data = bytearray(path.read_bytes())
    data[position : position + len(replacement)] = replacement
    path.write_bytes(data)


def test_files_byte_for_byte(prefix):
    assert prefix.with_suffix(".idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        b"\x01\x00\x00\x00\x00\x00\x00\x00"  # version
        b"\x08"  # uint16
        b"\x02\x00\x00\x00\x00\x00\x00\x00"  # documents
        b"\x03\x00\x00\x00\x00\x00\x00\x00"  # borders
        b"\x03\x00\x00\x00\x02\x00\x00\x00"  # sizes in tokens
        b"\x00\x00\x00\x00\x00\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00"  # offsets in bytes
        b"\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00"
    )
    assert prefix.with_suffix(".bin").read_bytes() == b"\x05\x00\x06\x00\x00\x00\x07\x00\x00\x00"


def test_length_of_the_index(tmp_path):
    write(tmp_path / "data", [[1, 0]] * 200, vocab_size=65536)
    assert (tmp_path / "data.idx").stat().st_size == 4042


@pytest.mark.parametrize(("vocab_size", "code", "dtype"), [(256, 8, "<u2"), (65536, 8, "<u2"), (65537, 4, "<i4")])
def test_dtype_follows_the_vocabulary(tmp_path, vocab_size, code, dtype):
    write(tmp_path / "data", [[vocab_size - 1]], vocab_size)
    assert (tmp_path / "data.idx").read_bytes()[17] == code
    assert open_binidx(tmp_path / "data").tokens.dtype == dtype


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", "<i4", "<i8", "<u2"])
def test_round_trip_of_every_dtype(tmp_path, dtype):
    limits = np.iinfo(dtype)
    documents = [np.array([limits.min, 1, limits.max], dtype), np.array([], dtype), np.array([0], dtype)]
    with BinidxWriter(tmp_path / "data", dtype) as writer:
        for document in documents:
            writer.append(document)
    pair = open_binidx(tmp_path / "data")
    assert pair.tokens.dtype == dtype
    assert pair.tokens.tolist() == [limits.min, 1, limits.max, 0]
    assert pair.sizes.tolist() == [3, 0, 1]
    assert pair.doc_count == 3


@given(st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=9).filter(any))
@settings(max_examples=30, deadline=None)
def test_round_trip_of_any_documents(tmp_path_factory, documents):
    prefix = tmp_path_factory.mktemp("any") / "data"
    with BinidxWriter(prefix, np.uint16) as writer:
        writer.append(documents[0])
        writer.append(sum(documents[1:], []), [len(document) for document in documents[1:]])
    pair = open_binidx(prefix)
    read = np.split(pair.tokens, np.cumsum(pair.sizes)[:-1])
    assert [document.tolist() for document in read] == documents


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_prefix_with_or_without_suffix(prefix, suffix):
    pair = open_binidx(f"{prefix}{suffix}")
    assert pair.prefix == prefix
    assert isinstance(pair.tokens, np.memmap)
    assert pair.tokens.tolist() == [5, 6, 0, 7, 0]
    assert is_binidx(f"{prefix}{suffix}")


def test_dots_in_the_name_are_kept(tmp_path):
    write(tmp_path / "v1.5", [[1]], 256)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v1.5.bin", "v1.5.idx"]
    assert open_binidx(tmp_path / "v1.5").tokens.tolist() == [1]


def test_is_binidx(prefix, tmp_path):
    (tmp_path / "text").write_text("a")
    assert not is_binidx(tmp_path / "text")
    assert not is_binidx(tmp_path / "missing")
    prefix.with_suffix(".idx").unlink()
    assert is_binidx(prefix)


FAULTS = {
    "magic": (".idx", 0, b"X", "begin with"),
    "version": (".idx", 9, b"\2", "version 1, got 2"),
    "dtype code 0": (".idx", 17, b"\0", "got 0"),
    "float": (".idx", 17, b"\6", "got 6"),
    "double": (".idx", 17, b"\7", "got 7"),
    "wider dtype": (".idx", 17, b"\4", "document 1"),
    "documents": (".idx", 18, b"\3", "wanted 94 bytes"),
    "absurd count": (".idx", 18, b"\xff" * 8, "wanted"),
    "size": (".idx", 34, b"\4", "document 1: wanted it at byte 8 .* got byte 6"),
    "last size": (".idx", 38, b"\3", "data.bin: wanted 12 bytes, got 10"),
    "negative size": (".idx", 38, b"\xff\xff\xff\xff", "document 1"),
    "first offset": (".idx", 42, b"\2", "document 0"),
    "offset": (".idx", 50, b"\4", "document 1"),
    "first border": (".idx", 58, b"\1", "rise from 0 to 2"),
    "falling border": (".idx", 66, b"\3", "rise from 0 to 2"),
    "last border": (".idx", 74, b"\1", "rise from 0 to 2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(prefix, fault):
    suffix, position, replacement, message = FAULTS[fault]
    edited(prefix.with_suffix(suffix), position, replacement)
    with pytest.raises(DataError, match=message):
        open_binidx(prefix)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
@pytest.mark.parametrize("change", ["missing", "empty", "cut short", "too many"])
def test_wrong_lengths_are_refused(prefix, suffix, change):
    path = prefix.with_suffix(suffix)
    data = path.read_bytes()
    path.unlink()
    if change != "missing":
        path.write_bytes({"empty": b"", "cut short": data[:-1], "too many": data + b"\0"}[change])
    with pytest.raises(DataError, match=f"{path.name}: .*{'' if change == 'empty' else change}"):
        open_binidx(prefix)


@pytest.mark.parametrize("sizes", [[], [0]])
def test_a_pair_without_tokens_is_refused(tmp_path, sizes):
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(sizes), len(sizes) + 1)
    body = np.array(sizes, "<i4").tobytes() + np.zeros(len(sizes), "<i8").tobytes()
    (tmp_path / "data.idx").write_bytes(header + body + np.arange(len(sizes) + 1, dtype="<i8").tobytes())
    (tmp_path / "data.bin").write_bytes(b"")
    with pytest.raises(DataError, match="data.bin: wanted at least one token"):
        open_binidx(tmp_path / "data")


def test_documents_in_pieces_are_read(tmp_path):
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 1, 3, 3)
    body = np.array([1, 2, 1], "<i4").tobytes() + np.array([0, 1, 3], "<i8").tobytes()
    (tmp_path / "data.idx").write_bytes(header + body + np.array([0, 2, 3], "<i8").tobytes())
    (tmp_path / "data.bin").write_bytes(b"\1\2\3\4")
    pair = open_binidx(tmp_path / "data")
    assert (pair.doc_count, pair.sizes.tolist(), pair.tokens.tolist()) == (2, [1, 2, 1], [1, 2, 3, 4])


def test_nothing_is_left_of_a_failed_write(tmp_path):
    with pytest.raises(DataError, match="65536 does not fit uint16"):
        write(tmp_path / "data", [[1], [65536]], vocab_size=65536)
    with pytest.raises(DataError, match="no token"):
        write(tmp_path / "data", [], vocab_size=65536)
    with contextlib.suppress(KeyError), BinidxWriter(tmp_path / "data", np.uint16) as writer:
        writer.append([1])
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_pair_is_safe(prefix, tmp_path):
    with pytest.raises(DataError, match="data.bin: exists"):
        write(prefix, [[9]], vocab_size=65536)
    with pytest.raises(DataError, match="-1 does not fit"):
        write(prefix, [[9], [-1]], vocab_size=65536, overwrite=True)
    assert open_binidx(prefix).tokens.tolist() == [5, 6, 0, 7, 0]
    write(prefix, [[9]], vocab_size=65536, overwrite=True)
    assert open_binidx(prefix).tokens.tolist() == [9]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]


def test_a_pair_that_appears_meanwhile_is_safe(tmp_path):
    def documents():
        yield [1]
        (tmp_path / "data.bin").write_bytes(b"theirs")
        yield [2]

    with pytest.raises(DataError, match="exists"):
        write(tmp_path / "data", documents(), vocab_size=256)
    assert (tmp_path / "data.bin").read_bytes() == b"theirs"


@pytest.mark.parametrize(
    ("tokens", "sizes"), [([1, 2], [1]), ([1, 2], [3, -1]), ([1.5], None), ([[1]], None), (["a"], None)]
)
def test_unfit_documents_are_refused(tmp_path, tokens, sizes):
    with pytest.raises(DataError, match="sizes add up"), BinidxWriter(tmp_path / "data", np.uint16) as writer:
        writer.append(tokens, sizes)


@pytest.mark.parametrize("dtype", ["f4", "u4", "u8"])
def test_other_dtypes_are_refused(tmp_path, dtype):
    with pytest.raises(DataError, match="integer dtype"):
        BinidxWriter(tmp_path / "data", dtype)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "file" / "data", [[1]], 256)
