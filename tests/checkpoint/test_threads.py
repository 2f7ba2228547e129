"""A system that starts no more threads: weights are read, converted and computed by one."""

from __future__ import annotations

import threading

import pytest
import torch

import heron
from heron import cli, machine
from heron.config import TrainConfig
from heron.train import Trainer


@pytest.fixture
def no_threads(monkeypatch):
    """A function: so many threads start, then no more."""
    start, threads = threading.Thread.start, torch.get_num_threads()

    def limit(n):
        left = [n]

        def refuse(thread):
            left[0] -= thread.name != "heron-progress"  # which does without
            if left[0] < 0:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        torch.set_num_threads(4)

    yield limit
    torch.set_num_threads(threads)


@pytest.mark.parametrize("allowed", [0, 1, 3])
@pytest.mark.parametrize("target", ["x.safetensors", "x.pth", "folder"])
def test_convert_goes_on_with_one(random_model, tmp_path, capsys, no_threads, target, allowed):
    heron.save(random_model(variant="v7", n_layer=1, n_embd=64, head_size=64, vocab_size=19), tmp_path / "w.pth")
    no_threads(allowed)
    command = ["convert", str(tmp_path / "w.pth"), str(tmp_path / target), "--check"]
    assert cli.main([*command, *(["--format", "hf", "--tokenizer", "integers:19"] if target == "folder" else [])]) == 0
    out, err = capsys.readouterr()
    assert "before and after, in fp32: 0\n" in out
    assert (
        err == f"heron: warning: threads: wanted 4, and the system starts no more than {allowed} (see ulimit -u); "
        "going on with one\n"
    )
    assert torch.get_num_threads() == 1


@pytest.fixture
def no_threads_that_compute(monkeypatch):
    """Threads of OpenMP cannot start, as far as can be tried, and those of Python that a run has can."""
    start = threading.Thread.start

    def refuse(thread):
        if getattr(thread._target, "__qualname__", "") == "Event.wait":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.filterwarnings("ignore:threads. wanted")
def test_a_run_trains_and_goes_on_with_one(tmp_path, request, monkeypatch):
    monkeypatch.setattr("heron.train.loop.plot", lambda folders, out: None)  # which takes longer than the run
    settings = dict(
        model=heron.ModelConfig(variant="v7", n_layer=1, n_embd=64, vocab_size=256),
        out=str(tmp_path / "r"), ctx_len=16, micro_bsz=1, sample_every=0, eval_every=0,
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        assert Trainer(TrainConfig(**settings, max_steps=1, threads=2), say=str).fit() == "finished"
        request.getfixturevalue("no_threads_that_compute")
        for out in (tmp_path / "r", tmp_path / "fresh"):
            torch.set_num_threads(2)
            trainer = Trainer(TrainConfig(**settings | {"out": str(out)}, max_steps=2), say=str)
            assert trainer.fit() == "finished"
            assert (trainer.config.threads, torch.get_num_threads()) == (1, 1)
    finally:
        torch.set_num_threads(threads)


def test_other_verbs_end_in_one_line(tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("heron.commands.convert.convert", refuse)
    assert cli.main(["convert", "a.pth", "b.pth"]) == 1
    assert (
        capsys.readouterr().err
        == "heron: can't start new thread: the system allows no more processes (see ulimit -u)\n"
    )


def test_where_threads_start_nothing_changes(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: pytest.fail("changed"))
    before = threading.active_count()
    machine.settle_threads()
    assert threading.active_count() == before
