"""benchmarks/history.py: a line for each figure, of what it was measured on."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import history


def options_of(*line):
    parser = argparse.ArgumentParser()
    history.add_flags(parser)
    return parser.parse_args(line)


def test_a_figure_is_kept_with_what_it_was_measured_on(tmp_path):
    options = options_of("--record", f"{tmp_path}/h.jsonl", "--commit", "abc1234")
    for speed in (123.456789, 2.0):
        history.record(options, "train.py", "wide on 1", {"k tokens/s": speed})
    first, second = map(json.loads, (tmp_path / "h.jsonl").read_text().splitlines())
    assert (first["k tokens/s"], second["k tokens/s"]) == (123.46, 2.0)
    assert (first["commit"], first["benchmark"], first["row"]) == ("abc1234", "train.py", "wide on 1")
    assert {"date", "device", "torch"} <= first.keys()


def test_nothing_is_kept_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "HISTORY", tmp_path / "h.jsonl")
    history.record(options_of(), "train.py", "wide on 1", {"ms": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_lines_are_found_by_all_words():
    lines = ['{"row": "wide", "device": "NVIDIA H200"}', '{"row": "wide", "device": "CPU"}']
    assert history.found(lines, ["wide", "H200"]) == lines[:1]
    assert history.found(lines, []) == lines


def test_every_line_of_the_history_is_whole():
    for line in history.HISTORY.read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        named = {"date", "commit", "device", "torch", "benchmark", "row"}
        assert named < told.keys()
        assert all(isinstance(value, float | int) for name, value in told.items() if name not in named)
        assert (history.HISTORY.parent / told["benchmark"].split(" ")[0]).exists()
