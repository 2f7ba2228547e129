"""heron generate, chat and eval with ROSA memory and documents, from the command line."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys

import pytest
import torch

import heron
from heron import cli
from heron.commands.citations import Citations
from heron.generation import Token
from heron.model.memory import Match
from heron.ops import _build

pytestmark = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
HERONS = "Herons stand in shallow water and wait for fish."
CATS = "All cats sit on mats, all day long."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents with their index, a model that says what it recalls, and its twin without memory."""
    here = tmp_path_factory.mktemp("recalling")
    (here / "docs").mkdir()
    (here / "docs" / "herons.txt").write_text(HERONS)
    (here / "docs" / "cats.txt").write_text(CATS)
    (here / "scored.txt").write_text(f"{HERONS} {CATS} " * 3)
    (here / "lambada.jsonl").write_text(json.dumps({"text": HERONS}))
    sizes = dict(variant="v8", n_layer=1, n_embd=32, head_size=16, vocab_size=256)
    torch.manual_seed(0)
    heron.save(heron.RWKV(heron.ModelConfig(**sizes)), here / "twin.pth")
    model = heron.RWKV(heron.ModelConfig(**sizes, rosa="memory"))
    with torch.no_grad():
        model.memory.copy[0, 3:] = 25.0
        model.head.weight.normal_(0, 0.02)
    heron.save(model, here / "model.pth")
    with contextlib.chdir(here):
        for name, ids in (("docs", "bytes"), ("world", "world")):
            assert cli.main(shlex.split(f"memory build docs --out {name}.memory --tokenizer {ids}")) == 0
    return here


@pytest.fixture
def heron_(capsys, folder, monkeypatch):
    """A function: the words after `heron`, {here} for the folder -> exit code, standard output, error."""
    monkeypatch.chdir(folder)

    def run(words):
        try:
            code = cli.main(shlex.split(words))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_generate_recalls_documents_and_names_its_sources_on_stderr(heron_):
    words = "generate model.pth --prompt 'The Herons s' --temperature 0 --max_tokens 100"
    code, without, _ = heron_(words)
    assert (code, HERONS in without) == (0, False)
    code, out, err = heron_(f"{words} --memory docs.memory --show_memory")
    assert (code, out) == (0, f"The {HERONS}\n")
    *_, title, passage = err.splitlines()
    assert title == "recalled:"
    assert re.fullmatch(r"  tand in shallow water and wai… +40 tokens  docs/herons.txt, token 8", passage)
    assert max(map(len, err.splitlines())) < 80


def test_what_the_sequence_itself_recalls_is_told_by_how_far_back_it_is(heron_):
    code, out, err = heron_("generate model.pth --prompt 'abcdefgh abcd' --temperature 0 --max_tokens 9 --show_memory")
    assert (code, out) == (0, "abcdefgh abcdefgh abcd\n")
    assert "9 tokens back" in err


def test_in_a_terminal_what_was_recalled_is_underlined_and_the_sources_follow(heron_, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    words = "generate model.pth --prompt 'Herons s' --temperature 0 --max_tokens 3 --memory docs.memory --show_memory"
    code, out, err = heron_(words)
    assert (code, err) == (0, "")
    underlined = "".join(f"\x1b[4m{character}\x1b[24m" for character in "tan")
    assert out.startswith(f"Herons s{underlined}\n\nrecalled:\n")
    monkeypatch.setenv("TERM", "dumb")
    assert heron_(words)[1].startswith("Herons stan\n")


def test_a_passage_goes_on_while_the_next_token_follows_the_last_one():
    citations = Citations(None, in_terminal=False)
    back = [Match(5, 4, 7), Match(5, 5, 7), None, Match(5, 6, 7), Match(5, 4, 8), Match(5, 3, 8), Match(5, 4, None, 9)]
    for match in [*back, Match(5, 4, None, 10), Match(5, 4, None, 12)]:
        assert citations.add(Token(5, 0.0, match), "a") == "a"
    counts = [int(re.search(r"(\d+) token", line)[1]) for line in citations.sources()[1:]]
    assert counts == [2, 1, 1, 2, 1]
    for place in range(100, 140, 2):
        citations.add(Token(5, 0.0, Match(5, 4, None, place)), "b")
    assert len(citations.sources()) == 1 + 12 + 1
    assert citations.sources()[-1] == "  and 13 shorter or later ones"
    assert Citations(None, False).sources() == ["nothing was recalled (no match of 4 tokens or more)"]


def test_chat_looks_into_documents(heron_, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Herons stand\n/quit\n")))
    code, out, _ = heron_("chat model.pth --memory docs.memory --temperature 0 --max_tokens 5")
    assert code == 0
    assert "Assistant:" in out


@pytest.mark.parametrize("flags", ["--data scored.txt --ctx_len 32", "--lambada lambada.jsonl"])
def test_eval_says_what_it_looks_back_on_and_both_modes_agree(heron_, flags):
    figures = {}
    for mode in ("gpt", "rnn"):
        for documents in ("", "--memory docs.memory", "--memory_from docs"):
            code, out, _ = heron_(f"eval model.pth {flags} --mode {mode} {documents} --json scores.json")
            assert code == 0
            lines = [line for line in out.splitlines() if line.startswith("memory ")]
            assert len(lines) == 1
            assert "before a token" in lines[0]
            assert lines[0].endswith(f", and on {documents.partition(' ')[2]}" if documents else ("too", "token"))
            figures[mode, documents] = float(re.search(r"perplexity +([\d.]+)", out)[1])
    assert figures["rnn", ""] == pytest.approx(figures["gpt", ""], rel=1e-4)
    told = [figures[key] for key in figures if key[1]]
    assert told == pytest.approx([told[0]] * 4, rel=1e-4)
    assert told[0] < figures["gpt", ""]


def test_eval_of_a_model_without_memory_says_nothing_of_it(heron_):
    assert "memory" not in heron_("eval twin.pth --data scored.txt")[1]
    code, out, _ = heron_("eval twin.pth model.pth --data scored.txt")
    assert code == 0
    assert [line for line in out.splitlines() if "memory" in line] == [
        "model.pth: its memory looks back on all of the data before a token, past its window too"
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("generate twin.pth --prompt a --memory docs.memory", "this model has no ROSA memory"),
        ("chat twin.pth --memory docs.memory", "this model has no ROSA memory"),
        ("generate twin.pth --prompt a --show_memory", "leave --show_memory out"),
        ("eval twin.pth --data scored.txt --memory docs.memory", "this model has no ROSA memory"),
        ("eval twin.pth --data scored.txt --memory_from docs", "this model has no ROSA memory"),
        ("generate model.pth --prompt a --memory world.memory", "was built with the tokenizer world"),
        ("generate model.pth --prompt a --memory nowhere.memory", "nowhere.memory"),
        ("generate model.pth --prompt a --memory scored.txt", "scored.txt"),
        ("eval model.pth --data scored.txt --memory_from scored.txt", "is what is scored"),
        ("eval model.pth --data scored.txt --memory_from docs --memory docs.memory", "not both"),
    ],
)
def test_bad_input_is_one_line(heron_, words, expected):
    code, _, err = heron_(words)
    assert code != 0
    assert expected in err
    assert err.count("\n") == 1
