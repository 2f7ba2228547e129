"""What the tests of training share: the command line, called in this process."""

from __future__ import annotations

import pytest

from heron import cli


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
