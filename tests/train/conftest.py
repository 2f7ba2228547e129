"""What the tests of training share: the command line, called in this process, and runs without pictures."""

from __future__ import annotations

import pytest

from heron import cli
from heron.train import loop


@pytest.fixture(autouse=True)
def drawn(request, monkeypatch):
    """A picture takes longer than such a run, so only `picture` has it drawn. The runs that would have had one."""
    runs = []
    if "picture" not in request.fixturenames:
        monkeypatch.setattr(loop, "plot", lambda folders, out: runs.append((folders, out)))
    return runs


@pytest.fixture
def picture():
    """Has `loss.png` drawn."""


@pytest.fixture
def heron_(capsys):
    """A function of words that gives exit code, output and errors."""

    def run_(*words):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run_
