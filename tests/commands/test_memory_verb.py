"""`heron memory` and `heron prepare --memory` from the command line."""

from __future__ import annotations

import shlex

import pytest

from heron import cli
from heron.data import recalled
from heron.data.binidx import open_binidx
from heron.data.token_index import read
from heron.ops import _build
from heron.tokenizer import load

needs_cpp = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def heron_(capsys, tmp_path):
    """A function: the words after `heron`, {here} for a folder with text.txt -> exit code, standard output, error."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat. the cat sat on the hat. " * 3)

    def run(words):
        code = cli.main(shlex.split(words.format(here=tmp_path)))
        return code, *capsys.readouterr()

    return run


@needs_cpp
def test_an_index_is_built_and_described(heron_, tmp_path):
    code, out, err = heron_("memory build {here}/text.txt --out {here}/docs.memory --tokenizer bytes --max_match 9")
    assert (code, err) == (0, "")
    assert "documents   1, " in out
    assert "of up to 9 tokens\n" in out
    assert read(tmp_path / "docs.memory", load("bytes")).n_tokens == 145
    code, described, err = heron_("memory info {here}/docs.memory --tokenizer bytes --verify")
    assert (code, err) == (0, "")
    assert described == out.replace("not compared; --verify does", "compared, all right")
    code, _, err = heron_("memory info {here}/docs.memory --tokenizer world")
    assert code == 1
    assert err.count("\n") == 1
    assert "was built with the tokenizer bytes" in err


@needs_cpp
def test_matches_stay_within_documents_where_asked_for(heron_):
    words = (
        "memory build {here}/text.txt --out {here}/docs.memory --split-at . --across-documents off --tokenizer bytes"
    )
    code, out, _ = heron_(words)
    assert code == 0
    assert "of up to 64 tokens, within documents, which end with id 0\n" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("memory info {here}/none", "none: no such file"),
        ("memory info {here}/text.txt", "text.txt: is no memory of documents"),
        ("memory build {here}/text.txt --out {here}/text.txt", "was not written by this command"),
        ("memory build {here}/none.txt --out {here}/x", "none.txt: no such file"),
        (
            "memory build {here}/text.txt --out {here}/x --tokenizer integers:9 --across_documents off",
            "--eod names one",
        ),
        ("prepare {here}/text.txt --out {here}/x --memory --max_match 0", "max_match: wanted"),
        ("prepare {here}/text.txt --out {here}/x --memory --window 0", "window: wanted"),
    ],
)
def test_bad_input_is_one_line(heron_, tmp_path, words, told):
    before = (tmp_path / "text.txt").read_bytes()
    code, out, err = heron_(words)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert told in err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    assert (tmp_path / "text.txt").read_bytes() == before


def test_prepare_writes_what_is_recalled_with_the_pair_or_beside_one(heron_, tmp_path):
    code, out, err = heron_("prepare {here}/text.txt --tokenizer bytes --out {here}/data --memory --n_matches 3")
    assert (code, err) == (0, "")
    assert "data.recalled: 145 tokens, 9 bytes a token; --n_matches 3 --max_match 64\n" in out
    pair, rules = tmp_path / "data", recalled.Rules(n_matches=3)
    first = recalled.path_of(pair).read_bytes()
    recalled.read(pair, open_binidx(pair).tokens, rules)
    recalled.path_of(pair).unlink()
    assert heron_("prepare {here}/data --memory --n_matches 3")[0] == 0
    assert recalled.path_of(pair).read_bytes() == first
    code, _, err = heron_("prepare {here}/data --memory")
    assert (code, err.count("\n")) == (1, 1)
    assert "data.recalled: exists; allow overwriting (--overwrite)" in err
    assert (
        heron_("prepare {here}/data --memory --overwrite --across_documents off --window 8 --tokenizer bytes")[0] == 0
    )
    recalled.read(pair, open_binidx(pair).tokens, recalled.Rules(window=8, end=0))
    code, out, _ = heron_("info {here}/data")
    assert code == 0
    assert "--window 8 --across_documents off; its hash is right" in out


def test_prepare_refuses_another_place_for_what_a_binidx_recalls(heron_, tmp_path):
    heron_("prepare {here}/text.txt --tokenizer bytes --out {here}/data")
    code, _, err = heron_("prepare {here}/data --memory --out {here}/other")
    assert (code, err.count("\n")) == (1, 1)
    assert "data: is a binidx pair, which is encoded already" in err
    assert not list(tmp_path.glob("other*"))
