"""What is said about work that takes long: nothing at first, then a line that a terminal keeps up to date."""

from __future__ import annotations

import io
import sys
import time

import pytest

from heron import progress as module
from heron.errors import KernelError
from heron.ops import _build
from heron.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.02)


def wait_for(text, stream):
    deadline = time.monotonic() + 20
    while text not in stream.getvalue() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert text in stream.getvalue()


def shown_on(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_short_work_is_done_without_a_word(capsys):
    with progress("adding one and one"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_pipe_has_a_line_at_the_beginning_and_one_at_the_end(hasty, monkeypatch):
    err = shown_on(io.StringIO(), monkeypatch)
    with progress("learning a vocabulary") as note:
        note("2 of 3")
        wait_for("...", err)
    first, second = err.getvalue().splitlines()
    assert first == "heron: learning a vocabulary, 2 of 3 ..."
    assert second.startswith("heron: learning a vocabulary: done after 0 s")


def test_a_terminal_has_one_line_which_goes_away(hasty, monkeypatch):
    err = shown_on(Terminal(), monkeypatch)
    with progress("learning a vocabulary"):
        wait_for("heron: learning a vocabulary, 0 s", err)
    assert "\n" not in err.getvalue()
    assert err.getvalue().endswith("\r\x1b[2K")


def test_the_innermost_work_alone_is_shown(hasty, monkeypatch):
    err = shown_on(io.StringIO(), monkeypatch)
    with progress("estimating"), progress("building rosa"):
        wait_for("building rosa ...", err)
    assert "estimating" not in err.getvalue().splitlines()[0]


def test_work_that_fails_is_not_said_to_be_done(hasty, monkeypatch):
    err = shown_on(io.StringIO(), monkeypatch)
    work = progress("dividing")
    work.__enter__()
    wait_for("...", err)
    assert not work.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert "done" not in err.getvalue()


@pytest.mark.parametrize("closed", [True, False], ids=["a closed standard error", "none at all"])
def test_nobody_to_tell_is_no_reason_to_stop(hasty, monkeypatch, closed):
    stream = io.StringIO() if closed else None
    if closed:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("talking to myself"):
        time.sleep(0.05)


def test_a_library_that_is_built_is_named(hasty, monkeypatch, tmp_path):
    err = shown_on(io.StringIO(), monkeypatch)

    def compile_into(folder):
        wait_for("heron: building rosa, once for this machine ...", err)
        raise KernelError("enough")

    with pytest.raises(KernelError, match="enough"):
        _build._build("rosa", tmp_path / "rosa-0", tmp_path / "rosa-0" / "rosa.so", compile_into)
