"""Commands whose reader has left, or whose output goes to a disk that is full."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

import heron
from tests import warm

pytestmark = pytest.mark.skipif(os.name == "nt", reason="pipes and /dev/full of POSIX")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "x.pth"
    heron.save(heron.RWKV(dict(variant="v8", n_layer=1, n_embd=64, vocab_size=256)), path)
    return path


def unread(*words, stderr=subprocess.PIPE):
    """The exit code of a command that writes into a pipe without a reader, and what it says on standard error."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as pipe:
        return _ended(words, pipe, pipe if stderr is None else stderr)


def on_a_full_disk(*words):
    with open("/dev/full", "w") as full:
        return _ended(words, full, subprocess.PIPE)


def _ended(words, stdout, stderr):
    with warm.start(["-m", "heron", *words], stdout, stderr) as process:
        errors = process.communicate(100)[1]
        return process.returncode, errors


def training(folder, *more):
    text = folder / "text.txt"
    text.write_text("".join(f"Number {n} is {n * n % 97}.\n" for n in range(60)))
    sizes = ("--n_layer", "1", "--n_embd", "64", "--ctx_len", "16", "--micro_bsz", "1", "--max_steps", "3")
    run = ("--out", folder / "run", "--device", "cpu", "--threads", "1", "--sample_every", "0")
    return ("train", "--data", text, "--tokenizer", "bytes", *sizes, *run, *more)


def finished(folder):
    return json.loads((folder / "run_status.json").read_text())["status"] == "finished"


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    code, errors = unread(*training(tmp_path))
    assert (code, finished(tmp_path / "run")) == (0, True)
    assert errors.count("standard output: Broken pipe; what can't be printed is dropped, and the work goes on") == 1


def test_a_run_goes_on_when_nobody_reads_its_errors_either(tmp_path):
    code, _ = unread(*training(tmp_path, "--no_such_flag", "1"), stderr=None)
    assert code == 2
    code, _ = unread(*training(tmp_path, "--num_workers", "2"), stderr=None)
    assert (code, finished(tmp_path / "run")) == (0, True)


def test_a_run_whose_output_finds_no_room_goes_on_and_its_exit_code_says_that_lines_are_lost(tmp_path):
    code, errors = on_a_full_disk(*training(tmp_path))
    assert (code, finished(tmp_path / "run")) == (1, True)
    assert errors.splitlines()[-1] == "heron: standard output: No space left on device"


def test_a_verb_that_writes_a_file_writes_it_without_a_reader(weights, tmp_path):
    code, _ = unread("convert", weights, tmp_path / "y.safetensors", "--check")
    assert code == 0
    assert heron.load(tmp_path / "y.safetensors").config.n_embd == 64


@pytest.mark.parametrize("words", [("info",), ("generate", "--max_tokens", "100000000", "--tokenizer", "bytes")])
def test_a_verb_that_only_prints_ends_quietly_with_its_reader(weights, words):
    verb, *flags = words
    assert unread(verb, weights, *flags) == (0, "")
