"""Each example runs as a stranger would run it, for a step or two, and is short."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import heron

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch, capsys):
    """A function: name of an example, its arguments -> what it printed and its globals."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        names = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out, names

    return run


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_tested_here(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 70
    assert f'example("{path.stem}"' in Path(__file__).read_text(encoding="utf-8")


@pytest.mark.usefixtures("picture")
def test_train_your_text(example, tmp_path):
    (tmp_path / "mine.txt").write_text("One fish, two fish, red fish, blue fish.\n" * 100)
    arguments = ("--data", tmp_path / "mine.txt", "--out", tmp_path / "run", "--prompt", "One ", "--steps", 2)
    out, names = example("train_your_text", *arguments)
    assert out.count("One ") >= 2
    assert heron.load(tmp_path / "run").config == names["config"].model
    assert (tmp_path / "run" / "loss.png").exists()


def test_finetune_chat(example, tmp_path):
    pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")
    out, names = example("finetune_chat", "--out", tmp_path, "--steps", 2)
    assert "pirate.jsonl: 40 rows" in out
    assert len(re.findall(r"^(before|after): loss of new plain text \d+\.\d{4}$", out, re.MULTILINE)) == 2
    assert re.findall(r"^  (\w+) +(plain|pirate) ", out, re.MULTILINE)[:2] == [("sky", "plain"), ("sky", "pirate")]
    assert "0.7 of them from the second corpus" in " ".join(out.split())
    base = heron.load(names["base"])
    assert not torch.equal(base.blocks[0].ffn.key.weight, names["model"].blocks[0].ffn.key.weight)


def test_music_tokens(example):
    out, names = example("music_tokens", "--steps", 2)
    assert out.count("loss") == 2
    assert "[3, 1, 4, 15, 60] -> [" in out
    inputs, targets = names["pieces"](3, names["generator"])
    assert inputs.shape == targets.shape == (3, 9)
    assert (targets[:, :4] == -100).all()
    assert (targets[:, 4:8] == inputs[:, :4].flip(1) + 12).all()
    assert (targets[:, 8] == 61).all()


def test_state_passing(example):
    out, names = example("state_passing", "--steps", 3, "--piece", 16)
    assert re.findall(r"step +(\d+)", out) == ["1", "3"]
    assert names["at"] == 48
    assert names["state"].batch_size == 8
    assert not any(part.requires_grad for part in names["state"].to_list())


@pytest.mark.parametrize("task", ["repeat", "reverse", "add"])
def test_rosa_tasks(example, task):
    out, names = example("rosa_tasks", task, "--steps", 2)
    assert "answers" in out
    tokens, targets = names["batch"](task, names["random"].Random(0), 5)
    for question, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        mark = question.index(names["MARK"], 1)
        asked = [n for n in question[:mark] if n != names["MARK"]]
        answer = [n for n in wanted if n >= 0][:-1]
        if task == "add":
            numbers = [
                int("".join(map(str, part)))
                for part in (asked[: asked.index(names["PLUS"])], asked[asked.index(names["PLUS"]) + 1 :])
            ]
            assert int("".join(map(str, answer))) == sum(numbers)
        else:
            assert answer == (asked if task == "repeat" else asked[::-1])
        assert wanted[mark : mark + len(answer)] == answer


def test_rosa_counting(example):
    out, names = example("rosa_counting", "--steps", 1)
    assert "256 fresh sequences: loss 2." in out
    ids = names["sequence"](names["random"].Random(3))
    numbers = [int(n) for n in "".join(" " if i == 10 else str(i) for i in ids).split()][:-1]
    assert len(ids) == 128
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_recall(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, names = example("recall", "--steps", 2, "--distances", 300, 5000, "--strings", 2)
    assert out.count("tokens later") == 4
    assert (tmp_path / "recall.png").stat().st_size > 1000
    sample = names["sample"](names["random"].Random(0))
    assert sample[-41:] == sample[:41]
