"""Every command in README and docs is one that exists: `heron ...` by the real parser, `make ...` by the Makefile."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from heron.commands import flags

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/music/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def commands(program):
    """The commands of `program` in the pages' code blocks, continued lines joined, comments and prompts taken off."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}.*\n", TEXT, re.MULTILINE)
    lines = "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    starts = re.compile(rf"^\s*(?:\$ )?(?:\S*/)?(?:python3? -m )?{program} (?=\S)")
    words = [shlex.split(line[found.end() :], comments=True) for line in lines if (found := starts.match(line))]
    return [command[:-1] if command[-1] == "&" else command for command in words]  # run beside what follows


def parsed(words):
    try:
        return flags.parser().parse_args(words)
    except SystemExit:
        return None


def test_the_pages_show_commands():
    assert len(commands("heron")) >= 30
    assert commands("make")


@pytest.mark.parametrize("words", commands("heron"), ids=" ".join)
def test_the_parser_takes_each_command(words):
    assert parsed(words) is not None


def test_the_parser_would_notice_a_wrong_command(capsys):
    assert parsed(["train", "--max_stepz", "3"]) is None
    assert "--max_steps" in capsys.readouterr().err


@pytest.mark.parametrize("words", commands("make"), ids=" ".join)
def test_make_has_each_target(words):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets)
