import json
import os

import numpy as np
import pytest

from heron.cli import main
from heron.data import binidx, checks
from heron.data.binidx import BinidxWriter, check_ids, describe, open_binidx, write
from heron.errors import DataError


@pytest.fixture
def prefix(tmp_path):
    """A pair of 3000 tokens, with hashes."""
    with BinidxWriter(tmp_path / "data", np.uint16, hashes=True) as writer:
        writer.append(np.arange(1, 1001))
        writer.append(np.arange(2000))
    return tmp_path / "data"


def pair(prefix):
    return binidx.idx_path(prefix), binidx.bin_path(prefix)


def poke(path, position, keep_time=False):
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_hashes_are_compared_at_first_use_and_not_again(prefix, monkeypatch):
    assert checks.read(pair(prefix)).seen is None
    assert open_binidx(prefix).known.seen is not None
    monkeypatch.setattr(checks, "_hashes", lambda *_: pytest.fail("hashed again"))
    open_binidx(prefix)


@pytest.mark.parametrize("opened_before", [False, True])
@pytest.mark.parametrize("position", [0, 1, 3000, 5999])
def test_a_flipped_bit_is_found(prefix, opened_before, position, monkeypatch):
    monkeypatch.setattr(checks, "BLOCK", 1000)
    checks.write(pair(prefix), checks.taken(pair(prefix)))
    if opened_before:
        open_binidx(prefix)
    poke(binidx.bin_path(prefix), position)
    begin = position // 1000 * 1000
    with pytest.raises(DataError, match=rf"data\.bin: bytes {begin:,} to {begin + 1000:,} are not what"):
        open_binidx(prefix)


def test_a_change_that_keeps_size_and_time_is_found_when_asked(prefix):
    open_binidx(prefix)
    poke(binidx.bin_path(prefix), 77, keep_time=True)
    open_binidx(prefix)
    with pytest.raises(DataError, match="data.bin: bytes 0 to"):
        open_binidx(prefix, verify=True)
    with pytest.raises(DataError, match="data.bin: bytes 0 to"):
        describe(prefix)


def test_a_change_that_the_layout_allows_is_found_by_the_hash_of_the_idx(prefix):
    idx = binidx.idx_path(prefix)
    raw = bytearray(idx.read_bytes())
    raw[-16:-8] = (0).to_bytes(8, "little")  # a document border that still rises
    idx.write_bytes(raw)
    with pytest.raises(DataError, match=r"data\.idx: bytes 0 to"):
        open_binidx(prefix)
    checks.path_for(pair(prefix)).unlink()
    open_binidx(prefix)


def test_the_kept_file_confirms_itself(prefix):
    path = checks.path_for(pair(prefix))
    sound = path.read_bytes()
    for position in range(0, len(sound), 7):
        damaged = bytearray(sound)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"data\.checks\.json: damaged"):
            open_binidx(prefix)
    path.write_bytes(sound)
    open_binidx(prefix)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"hashes": 1, "block": 0, "seen": 1, "ids": 1}', b"\xff", b"[" * 999]
)
def test_a_kept_file_of_another_kind_is_refused(prefix, content):
    checks.path_for(pair(prefix)).write_bytes(content)
    with pytest.raises(DataError, match=r"data\.checks\.json: damaged"):
        open_binidx(prefix)


def test_ids_of_a_large_pair_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(binidx, "_WORTH_KEEPING", 8)
    write(tmp_path / "data", [[5, 6, 900, 0]], vocab_size=65536)
    check_ids(open_binidx(tmp_path / "data"), 901)
    known = open_binidx(tmp_path / "data")
    assert known.known.ids == [0, 900]
    monkeypatch.setattr(binidx, "_TOKENS", None)
    check_ids(known, 901)
    monkeypatch.undo()
    with pytest.raises(DataError, match="id 900 at position 2 is outside the vocabulary of 900"):
        check_ids(known, 900)


def test_ids_are_read_again_when_the_tokens_have_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(binidx, "_WORTH_KEEPING", 1)
    write(tmp_path / "data", [[5, 6, 7]], vocab_size=65536)
    check_ids(open_binidx(tmp_path / "data"), 8)
    poke(tmp_path / "data.bin", 1)
    with pytest.raises(DataError, match="id 261 at position 0"):
        check_ids(open_binidx(tmp_path / "data"), 8)


def test_nothing_is_kept_of_a_small_pair_without_hashes(tmp_path):
    write(tmp_path / "data", [[5, 6, 7]], vocab_size=65536)
    check_ids(open_binidx(tmp_path / "data"), 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]


def test_where_nothing_can_be_kept_the_data_are_checked_each_time(prefix, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks, "write_to", refuse)
    with pytest.warns(UserWarning, match=r"data\.checks\.json: cannot be written: Permission denied"):
        pairs = open_binidx(prefix)
    with pytest.warns(UserWarning, match="at each start"):
        check_ids(pairs, 2000)
    poke(binidx.bin_path(prefix), 0)
    with pytest.raises(DataError, match="are not what"):
        open_binidx(prefix)


def test_overwriting_without_hashes_drops_the_old_ones(prefix):
    write(prefix, [[1]], 256, overwrite=True)
    assert not checks.path_for(pair(prefix)).exists()
    assert open_binidx(prefix).known.hashes is None


def test_description(prefix):
    text = describe(prefix)
    assert "3,000 of uint16" in text
    assert "2, the longest of 2,000 tokens" in text
    assert "compared, all right" in text
    checks.path_for(pair(prefix)).unlink()
    assert "hashes      none" in describe(prefix)


def test_hashes_are_sha256_of_blocks(prefix):
    import hashlib

    kept = json.loads(checks.path_for(pair(prefix)).read_bytes())
    assert kept["block"] == 1 << 26
    assert kept["hashes"] == [[hashlib.sha256(path.read_bytes()).hexdigest()] for path in pair(prefix)]


def test_the_commands_take_and_compare_hashes(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{bad\n')
    command = ["prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "data"), "--tokenizer", "bytes"]
    assert main(command) == 1
    assert "a.jsonl, line 2: not JSON" in capsys.readouterr().err
    assert main([*command, "--on-bad-line", "skip", "--hashes"]) == 0
    assert "1 skipped: see" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "data")]) == 0
    assert "hashes      compared, all right" in capsys.readouterr().out
    poke(tmp_path / "data.bin", 0, keep_time=True)
    assert main(["info", str(tmp_path / "data")]) == 1
    assert "data.bin: bytes 0 to 10 are not what" in capsys.readouterr().err
