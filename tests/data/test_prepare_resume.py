"""`prepare` is killed, stopped or interrupted, called again, and the files are those of a call that was left alone."""

import contextlib
import gzip
import json
import os
import signal

import pytest

from heron.data import binidx, checks
from heron.data import prepare as preparing
from heron.data.binidx import BinidxWriter, open_binidx
from heron.data.corpora import PLAIN, Reading
from heron.data.prepare import prepare
from heron.data.recalled import Rules
from heron.errors import ConfigError, DataError

SUFFIXES = (".bin", ".idx", ".recalled")
MEMORY = Rules(8)
TEXTS = [f"document {i} " + "é🦩 words " * (i % 7) for i in range(110)]


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    monkeypatch.setattr(preparing, "CHUNK_CHARACTERS", 200)
    monkeypatch.setattr(preparing, "COMMIT_BYTES", 3000)
    monkeypatch.setattr(preparing, "JOBS_WORTH_PROCESSES", 2)


@pytest.fixture
def source(tmp_path):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[100:100] = ["", "{bad"]
    lines.append(json.dumps({"text": "a\0b"}))  # the byte tokenizer's end of document inside a text
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "a.jsonl")


def start(source, out, **options):
    return prepare([source], str(out), "bytes", 1, on_bad_line="skip", hashes=True, memory=MEMORY, **options)


def written(out):
    hashes = json.loads(out.with_suffix(".checks.json").read_text())["hashes"]
    return [*(out.with_suffix(suffix).read_bytes() for suffix in SUFFIXES), hashes]


@pytest.fixture
def whole(source, tmp_path):
    """The files and the report of a call that was left alone."""
    stats = start(source, tmp_path / "whole")
    return written(tmp_path / "whole"), stats


def in_child(work):
    """The exit code of a forked process that does `work`; negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(monkeypatch, call):
    """Make the process kill itself before the n-th call that changes what lies on the disk; counted from 1."""
    calls = 0

    def counted(function):
        def wrapper(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapper

    for name in ("fsync", "replace", "unlink", "open"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def equal(whole, out, stats):
    files, wanted = whole
    assert written(out) == files
    assert (stats.tokens, stats.documents, stats.skipped, stats.max_id, stats.text_bytes) == (
        wanted.tokens, wanted.documents, wanted.skipped, wanted.max_id, wanted.text_bytes,
    )  # fmt: skip
    log = out.with_suffix(".skipped.log").read_text()
    assert log == out.with_name("whole.skipped.log").read_text()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize(("overwrite", "step"), [(False, 1), (True, 3)])
def test_killed_before_any_change_on_the_disk(source, whole, tmp_path, monkeypatch, overwrite, step):
    kills = resumed = 0
    for call in range(1, 1000, step):
        out = tmp_path / f"killed-{call}"
        if overwrite:
            binidx.write(out, [[1, 2, 3]], 256)
        code = in_child(lambda: (killed_at(monkeypatch, call), start(source, out, overwrite=overwrite)))  # noqa: B023
        if code == 0:
            break
        kills += 1
        with contextlib.suppress(DataError):
            pair = open_binidx(out)
            assert pair.tokens.tolist() == [1, 2, 3] or pair.tokens.tobytes() == whole[0][0], call
        if not list(tmp_path.glob("*.part*")) and out.with_suffix(".idx").exists() and not overwrite:
            assert written(out) == whole[0]  # it was done
            continue
        stats = start(source, out, overwrite=overwrite)
        resumed += stats.resumed_at > 0
        equal(whole, out, stats)
        assert not list(tmp_path.glob("*.part*")), call
    assert kills > 30 // step
    assert resumed > kills // 2


def test_an_interruption_keeps_what_was_committed(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    appended = BinidxWriter.append

    def interrupted(self, tokens, sizes):
        if b"document 99" in bytes(tokens):
            raise KeyboardInterrupt
        appended(self, tokens, sizes)

    with monkeypatch.context() as patch:
        patch.setattr(BinidxWriter, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(source, out)
    assert not out.with_suffix(".bin").exists()
    stats = start(source, out)
    assert 20 < stats.resumed_at < 100
    assert f"went on after {stats.resumed_at} documents" in str(stats)
    equal(whole, out, stats)


FORMS = {
    "a.json": (json.dumps([{"text": text} for text in TEXTS], indent=1).encode(), PLAIN),
    "a.jsonl.gz": (gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()), PLAIN),
    "a.csv": (("text\n" + "\n".join(f'"{text}"' for text in TEXTS)).encode(), PLAIN),
    "a.txt": ("#\n".join(TEXTS).encode(), Reading(split_at="#")),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_goes_on_to_the_same_bytes(tmp_path, monkeypatch, name):
    content, reading = FORMS[name]
    (tmp_path / name).write_bytes(content)
    arguments = ([str(tmp_path / name)], str(tmp_path / "out"), "bytes", 1)
    appended = BinidxWriter.append

    def interrupted(self, tokens, sizes):
        if b"document 99" in bytes(tokens):
            raise KeyboardInterrupt
        appended(self, tokens, sizes)

    with monkeypatch.context() as patch:
        patch.setattr(BinidxWriter, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(*arguments, reading=reading)
    assert 20 < prepare(*arguments, reading=reading).resumed_at < 100
    assert open_binidx(tmp_path / "out").tokens.astype("u1").tobytes() == b"".join(t.encode() + b"\0" for t in TEXTS)


def test_after_a_bad_line_skip_goes_on_from_there_and_stop_stops_again(source, tmp_path, whole):
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(DataError, match="a.jsonl, line 102: not JSON"):
            prepare([source], str(out), "bytes", 1, hashes=True, memory=MEMORY)
    stats = start(source, out)
    assert 0 < stats.resumed_at <= 100
    equal(whole, out, stats)


def test_skipped_documents_of_a_run_to_be_continued_stop_one_that_may_not_skip(tmp_path, monkeypatch):
    lines = [json.dumps({"text": text}) for text in ["a\0b", *TEXTS]]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{bad"]))
    monkeypatch.setattr(preparing, "MOST_SKIPPED", 1)
    with pytest.raises(DataError, match="2 lines or documents of the first .* cannot be used"):
        start(str(tmp_path / "a.jsonl"), tmp_path / "out")
    with pytest.raises(DataError, match="a.jsonl, line 1: .*NUL"):
        prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), "bytes", 1, hashes=True, memory=MEMORY)


@pytest.mark.parametrize("change", ["input", "vocab_size", "time"])
def test_other_inputs_start_over(source, tmp_path, monkeypatch, change):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="line 102"):
        prepare([source], str(out), "bytes", 1)
    vocab_size = 70_000 if change == "vocab_size" else None
    if change == "input":
        (tmp_path / "a.jsonl").write_text('{"text": "new"}')
    if change == "time":
        os.utime(source, ns=(0, 0))
    with pytest.warns(UserWarning, match="out.progress.part: of other inputs or settings; starting over"):
        stats = prepare([source], str(out), "bytes", 1, vocab_size, on_bad_line="skip")
    assert stats.resumed_at == 0
    prepare([source], str(tmp_path / "fresh"), "bytes", 1, vocab_size, on_bad_line="skip")
    assert out.with_suffix(".bin").read_bytes() == (tmp_path / "fresh.bin").read_bytes()


def test_a_damaged_record_of_progress_is_refused(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="line 102"):
        prepare([source], str(out), "bytes", 1)
    record = json.loads((tmp_path / "out.progress.part").read_text())
    for content, words in [
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps(record | {"bin_bytes": 10**9}), "are not there"),
    ]:
        (tmp_path / "out.progress.part").write_text(content)
        with pytest.raises(DataError, match=f"out.*{words}.*delete"):
            prepare([source], str(out), "bytes", 1)


def test_two_processes_cannot_write_one_pair(tmp_path):
    pytest.importorskip("fcntl")
    with BinidxWriter(tmp_path / "data", "u1") as writer:
        writer.append([1])
        with (
            pytest.raises(DataError, match="data.bin.part: another process is writing"),
            BinidxWriter(tmp_path / "data", "u1"),
        ):
            pass
        writer.append([2])
    assert open_binidx(tmp_path / "data").tokens.tolist() == [1, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_skipping_is_counted_and_logged(source, tmp_path, workers):
    stats = prepare([source], str(tmp_path / "out"), "bytes", workers, on_bad_line="skip")
    assert (stats.documents, stats.skipped) == (len(TEXTS), 2)
    first, second = (tmp_path / "out.skipped.log").read_text().splitlines()
    assert first.startswith(f"{source}, line 102: not JSON: ")
    assert "(the line begins at byte " in first
    assert f"{source}, line {len(TEXTS) + 3}: " in second
    assert "2 skipped: see" in str(stats)


def test_unknown_policy(source, tmp_path):
    with pytest.raises(ConfigError, match="wanted stop or skip, got 'ignore'"):
        prepare([source], str(tmp_path / "out"), "bytes", on_bad_line="ignore")


def test_hashes_are_part_of_the_job(source, tmp_path):
    prepare([source], str(tmp_path / "out"), "bytes", 1, on_bad_line="skip", hashes=True)
    assert open_binidx(tmp_path / "out", verify=True).known.hashes
    assert checks.path_for((tmp_path / "out.idx", tmp_path / "out.bin")).name == "out.checks.json"
