"""A run that is stopped before its first step, by one signal and by more; a vocabulary that is learned elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time

import pytest

import heron
from heron import cli, tokenizer
from heron.errors import ConfigError, HeronError
from heron.tokenizer import learned as vocabulary
from heron.train import loop as train
from heron.train import run_data
from heron.train import stop as preemption
from tests import warm

TEXT = "".join(f"Number {n} is {n * n % 97}; its root is near {n**0.5:.1f}.\n" for n in range(150))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    model = heron.ModelConfig(n_layer=1, n_embd=32, head_size=16, vocab_size=300)
    return heron.TrainConfig(
        model=model, data=str(tmp_path / "text.txt"), tokenizer="bpe:300", out=str(tmp_path / "run"), ctx_len=16,
        micro_bsz=1, max_steps=2, threads=1, dtype="fp32", device="cpu", save_every=0, sample_every=0,
    )  # fmt: skip


def interrupted(number):
    """A function that lasts as long as a library's call would, and is interrupted within."""

    def wait(*_, **__):
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        time.sleep(100)

    return wait


@pytest.mark.parametrize(
    ("holder", "name", "number"),
    [
        (run_data, "training_text", signal.SIGINT),
        (vocabulary, "learn", signal.SIGTERM),
        (vocabulary, "learn", signal.SIGINT),
        (run_data, "load_corpus", signal.SIGUSR1),
        (train, "RWKV", signal.SIGINT),
        (train, "Learner", signal.SIGUSR1),
    ],
    ids=["text", "vocabulary", "vocabulary again", "data", "model", "kernels"],
)
def test_a_stop_before_the_first_step_is_heard_at_once(config, tmp_path, monkeypatch, holder, name, number):
    said, before = [], signal.getsignal(number)
    begun = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, interrupted(number))
        assert heron.Trainer(config, say=said.append).fit() == "preempted"
    assert time.monotonic() - begun < 50
    stops = [line for line in said if line.startswith(number.name)]
    assert len(stops) == 1
    assert "the same command goes on" in stops[0]
    status = json.loads((tmp_path / "run" / "run_status.json").read_text())
    assert status == {"status": "preempted", "step": 0, "checkpoint": None}
    assert signal.getsignal(number) is before
    if number is signal.SIGTERM:
        assert heron.Trainer(config).fit() == "finished"


def test_a_resume_that_is_stopped_before_its_first_step_keeps_its_checkpoint(config, tmp_path, monkeypatch):
    heron.Trainer(config).fit()
    longer = heron.TrainConfig.from_dict({**config.to_dict(), "max_steps": 3})
    with monkeypatch.context() as patch:
        patch.setattr(run_data, "load_corpus", interrupted(signal.SIGTERM))
        assert heron.Trainer(longer).fit() == "preempted"
    status = json.loads((tmp_path / "run" / "run_status.json").read_text())
    assert status == {"status": "preempted", "step": 2, "checkpoint": "step-00000002"}
    assert heron.Trainer(longer).fit() == "finished"


def test_a_second_interrupt_says_what_is_lost_and_a_third_ends():
    said = []

    def count(_number, _frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, count)
    try:
        with preemption.Preemption(say=said.append) as stop:
            stop.begin()
            stop.at_stake = lambda: "what was trained since step 3 is lost (2 steps)"
            for lines in (1, 2):
                os.kill(os.getpid(), signal.SIGINT)
                _wait_until(lambda lines=lines: len(said) == lines)
            assert stop.reason == "SIGINT"
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopping after this step" in said[0]
    assert "once more ends the run at once: what was trained since step 3 is lost (2 steps)" in said[1]


def test_a_second_signal_of_a_program_ends_at_once():
    said, ended = [], []
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    try:
        with preemption.Preemption(say=said.append) as stop:
            stop.begin()
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            _wait_until(lambda: len(said) == 2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == [1]
    assert "ends the run at once" in said[1]


def _wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_interruptible_work_gives_its_result_and_its_error():
    with preemption.Preemption(say=lambda _: None) as stop:
        assert stop.interruptible(lambda: 3) == 3
        with pytest.raises(ConfigError, match="no"):
            stop.interruptible(lambda: (_ for _ in ()).throw(ConfigError("no")))
    assert not preemption.left_behind()


def test_a_vocabulary_is_what_the_library_learns_and_its_refusal_comes_back(monkeypatch):
    said = []
    monkeypatch.setattr(vocabulary, "_SECONDS_UNTIL_A_LINE", 60.0)
    assert vocabulary.learn([TEXT], 300, said.append) == tokenizer.learn_bpe([TEXT], 300)
    assert said == []
    monkeypatch.setattr(vocabulary, "_SECONDS_UNTIL_A_LINE", 0.0)
    with pytest.raises(ConfigError, match="this text gives only"):
        vocabulary.learn(["ab"], 5000, said.append)
    assert said[0].startswith("learning 5,000 ids from 0.0 M characters")
    monkeypatch.setattr(vocabulary, "_PROGRAM", "raise MemoryError('all of it is used')")
    with pytest.raises(HeronError, match="bpe:300: it could not be learned: MemoryError: all of it is used"):
        vocabulary.learn([TEXT], 300, said.append)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_while_pytorch_is_loaded_is_code_75_too(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr("heron.commands.train.train_config", interrupted(number))
    assert cli.main(["train", "--max_steps", "2", "--out", str(tmp_path / "run")]) == 75
    out, err = capsys.readouterr()
    assert out == f"{number.name}: stopping now, before the first step; the same command goes on\n"
    assert err == ""
    assert not (tmp_path / "run").exists()


def test_what_learns_a_vocabulary_ends_with_who_asked(monkeypatch):
    children = []
    monkeypatch.setattr(vocabulary, "_PROGRAM", "import time; time.sleep(60)")
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: children.append(popen(*a, **k)) or children[-1])
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(preemption.Stopped), preemption.Preemption(say=lambda _: None):
        vocabulary.learn([TEXT], 300, lambda _: None)
    assert children[0].returncode == -signal.SIGKILL


def test_the_command_ends_with_code_75(config, tmp_path):
    """In a process of its own, while the vocabulary of a longer text is learned."""
    (tmp_path / "text.txt").write_text("\n".join(heron.data.corpora.builtin("builtin:python-docs")) * 8)
    words = ["train", "--data", str(tmp_path / "text.txt"), "--tokenizer", "bpe:4000", "--out", str(tmp_path / "run")]
    words += ["--max_steps", "2", "--device", "cpu"]
    process = warm.start(["-m", "heron", *words], stderr=subprocess.STDOUT)
    try:
        _wait_until((tmp_path / "run" / "run.lock").exists, 60)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75, out
    assert out.count("SIGTERM: stopping now, before the first step; the same command goes on") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.lock", "run_status.json"]
