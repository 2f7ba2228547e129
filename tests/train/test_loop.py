"""Whole runs of a tiny model: what they leave behind, that stopping leaves no trace, and what they refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import heron
from heron import machine, report, tokenizer
from heron.checkpoint import run
from heron.data import binidx
from heron.data.loader import Batches, load_corpus
from heron.data.sampling import cubic_slot, magic_prime, permuted_starts
from heron.errors import CheckpointError, ConfigError, DataError, HeronError
from heron.evaluate import evaluate
from heron.model import rwkv
from heron.optim import lr_at
from heron.train import loop as train
from heron.train import result
from heron.train.step import Learner
from tests import warm
from tests.train.faults import Fault, StopAt, faulty

TEXT = "".join(f"Number {n} is {n * n % 97}; its square root is near {math.isqrt(n)}.\n" for n in range(150))
MODEL = heron.ModelConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=256)
KEYS = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "time"}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def settings(tmp_path, text):
    """A function: changes -> the TrainConfig of a run of 8 steps in tmp_path / "run"."""

    def make(**changes):
        values = dict(
            model=MODEL, data=str(text), out=str(tmp_path / "run"), ctx_len=32, micro_bsz=2, max_steps=8,
            lr_init=3e-3, lr_final=1e-3, warmup_steps=2, threads=1, dtype="fp32", device="cpu",
            save_every=0, eval_every=0, sample_every=0, sample_tokens=8,
        )  # fmt: skip
        return heron.TrainConfig(**{**values, **changes})

    return make


def fit(config, **options):
    return heron.Trainer(config, **options).fit()


def steps(config):
    """(step, loss, gradient norm, learning rate) of every logged step; floats as they were to the last bit."""
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in report.read_log(config.out)[0]]


def validations(config):
    return [(r["step"], r["val_loss"], r["val_bpb"]) for r in report.read_log(config.out)[1]]


def status_of(config):
    return json.loads(Path(config.out, "run_status.json").read_text())


def weights(config):
    return torch.load(f"{config.out}/rwkv-final.pth", weights_only=True)


def assert_same_run(one, other):
    assert steps(one) == steps(other)
    assert validations(one) == validations(other)
    assert_same_weights(weights(one), weights(other))


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def snapshot(folder):
    """Path, content and time of last change of everything in a folder but the lock."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "run.lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# -- what a run leaves behind ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("picture")
def test_the_run_folder(settings, tmp_path, capsys):
    config = settings(max_steps=9, save_every=3, keep=2, eval_every=4, sample_every=4, sample_prompt="Number 7")
    assert fit(config) == "finished"
    out = tmp_path / "run"
    names = ["checkpoints", "config.yaml", "log.jsonl", "loss.png", "run.lock", "run_status.json", "rwkv-final.pth"]
    assert sorted(path.name for path in out.iterdir()) == [*names, "rwkv-init.pth", "samples", "train_log.txt"]

    resolved = heron.TrainConfig.from_yaml(out / "config.yaml")
    assert resolved == dataclasses.replace(config, threads=1, weights="fp32")
    status = {"status": "finished", "step": 9, "checkpoint": "step-00000009"}
    assert json.loads((out / "run_status.json").read_text()) == status
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len((out / "train_log.txt").read_text().splitlines()) == 1

    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    trained = [record for record in log if "loss" in record]
    assert [record["step"] for record in trained] == list(range(1, 10))
    assert all(record.keys() == KEYS for record in trained)
    assert [record["tokens"] for record in trained] == [64 * n for n in range(1, 10)]
    assert [record["lr"] for record in trained] == [lr_at(step, config) for step in range(9)]
    assert [record["time"] for record in trained] == sorted(record["time"] for record in trained)
    validated = [record for record in log if "val_loss" in record]
    assert [record["step"] for record in validated] == [4, 8, 9]
    assert all(record.keys() == {"step", "val_loss", "val_bpb", "time"} for record in validated)

    samples = sorted((out / "samples").iterdir())
    assert [path.name for path in samples] == [f"step-{n:08d}.txt" for n in (4, 8, 9)]
    assert all(path.read_text(encoding="utf-8").startswith("Number 7") for path in samples)

    checkpoints = sorted((out / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-00000006", "step-00000009"]
    files = {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "trainer.json", "config.yaml"}
    assert all({path.name for path in folder.iterdir()} == files | {"manifest.json"} for folder in checkpoints)
    assert run.trainer_of(checkpoints[1])["exact"]["threads"] == 1

    torch.manual_seed(config.seed)
    assert_same_weights(heron.load(out / "rwkv-init.pth").state_dict(), heron.RWKV(MODEL).state_dict())
    assert_same_weights(heron.load(out).state_dict(), heron.load(out / "rwkv-final.pth").state_dict())
    assert heron.load(out).config == MODEL
    assert "0.08 M parameters" in capsys.readouterr().out


def test_the_picture_is_drawn_of_the_run(settings, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(train, "plot", lambda folders, out: drawn.append((folders, out)))
    fit(settings(max_steps=1))
    assert drawn == [([tmp_path / "run"], tmp_path / "run" / "loss.png")]


def test_losses_are_those_of_a_loop_written_out(settings):
    config = settings(max_steps=5, accumulate=2, grad_clip=0.05, val_fraction=0.0, seed=3)
    fit(config)
    data = torch.frombuffer(bytearray(TEXT.encode() + b"\0"), dtype=torch.uint8).long()
    starts = permuted_starts(len(data), 32, 3, 0)
    torch.manual_seed(3)
    model = heron.RWKV(MODEL)
    optimizer = heron.build_optimizer(model, config.lr_init, config.weight_decay)
    for step, (_, loss, grad_norm, lr) in enumerate(steps(config)):
        rows = torch.stack([data[start : start + 33] for start in starts[4 * step : 4 * step + 4]])
        expected = model.loss(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert loss == pytest.approx(expected.item(), abs=2e-5)
        assert grad_norm == pytest.approx(expected_norm.item(), rel=2e-3)
        assert grad_norm > 0.05  # as it was before clipping
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.step()
    assert step == 4


def test_the_loss_falls_on_a_repetitive_text(settings, text):
    text.write_text("abcdefgh\n" * 300)
    config = settings(max_steps=40, lr_init=1e-2)
    fit(config)
    losses = [loss for _, loss, *_ in steps(config)]
    assert losses[0] == pytest.approx(math.log(256), abs=0.5)
    assert losses[-1] < 0.3
    assert validations(config)[-1][1] < 0.3


def test_log_every_thins_the_log_and_the_last_step_is_in_it(settings):
    config = settings(max_steps=7, log_every=3)
    fit(config)
    assert [step for step, *_ in steps(config)] == [3, 6, 7]


# -- stopped and resumed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        dict(save_every=3, eval_every=2),
        dict(accumulate=2, save_every=4),
        dict(save_every=0),
        dict(dtype="bf16"),
        dict(tables="host", accumulate=2, eval_every=2, sample_every=3),
        dict(tables="host", tables_state="bf16", dtype="bf16", grad_checkpoint=True),
        dict(weights="bf16", dtype="bf16", accumulate=2, eval_every=3),
        dict(weights="bf16", dtype="bf16", tables="host", grad_checkpoint=True),
    ],
    ids=[
        "save_every",
        "accumulate",
        "only at the end",
        "bf16",
        "host tables",
        "host tables, all small",
        "bf16 weights",
        "bf16 weights, host tables",
    ],
)
def test_a_run_that_was_stopped_and_goes_on_is_bit_equal(settings, tmp_path, changes):
    whole = settings(out=str(tmp_path / "whole"), **changes)
    cut = settings(**changes)
    fit(whole)
    assert StopAt(cut, 5).fit() == "preempted"
    assert status_of(cut) == {"status": "preempted", "step": 5, "checkpoint": "step-00000005"}
    assert [step for step, *_ in steps(cut)] == [1, 2, 3, 4, 5]
    assert (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()
    assert fit(cut) == "finished"
    assert_same_run(whole, cut)


def test_the_same_trainer_goes_on_after_each_signal(settings, tmp_path):
    whole, cut = settings(out=str(tmp_path / "whole")), settings()
    fit(whole)
    before = signal.getsignal(signal.SIGINT)
    trainer = StopAt(cut, 2, signal.SIGINT)
    assert trainer.fit() == "preempted"
    assert signal.getsignal(signal.SIGINT) is before
    trainer._stop_step, trainer._number = 4, signal.SIGUSR1
    assert trainer.fit() == "preempted"
    assert [step for step, *_ in steps(cut)] == [1, 2, 3, 4]
    assert trainer.fit() == "finished"
    assert_same_run(whole, cut)


def test_a_signal_in_the_last_step_finishes_where_nothing_long_follows(settings):
    assert StopAt(settings(max_steps=3, val_fraction=0.0), 3).fit() == "finished"


def test_a_signal_in_the_last_step_leaves_its_validation_and_sample_for_later(settings, tmp_path):
    whole, cut = (settings(out=str(tmp_path / name), sample_every=3, eval_every=3) for name in ("whole", "cut"))
    fit(whole)
    for step in (6, 8):
        assert StopAt(cut, step).fit() == "preempted"
        assert [at for at, *_ in validations(cut)] == ([3] if step == 6 else [3, 6])
        assert run.trainer_of(run.newest(tmp_path / "cut"))["owed"] == ["validation", "sample"]
    assert not (tmp_path / "cut" / "rwkv-final.pth").exists()
    assert fit(cut) == "finished"
    assert_same_run(whole, cut)
    samples = [snapshot(Path(config.out) / "samples") for config in (whole, cut)]
    assert [content for content, _ in samples[0].values()] == [content for content, _ in samples[1].values()]
    assert len(samples[0]) == 3


def test_a_stop_before_the_first_log_line_is_logged(settings):
    config = settings(log_every=100)
    assert StopAt(config, 2).fit() == "preempted"
    assert [step for step, *_ in steps(config)] == [2]


def test_outside_the_main_thread_no_handler_is_set(settings):
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(fit(settings(max_steps=1))))
    thread.start()
    thread.join()
    assert outcome == ["finished"]


_SLOW_RUN = """
import sys, time
import heron

class Slow(heron.Trainer):
    def _gradients(self, parts, first):
        if first == 5 * self.config.micro_bsz:
            time.sleep(60)
        return super()._gradients(parts, first)

Slow(heron.TrainConfig.from_yaml(sys.argv[1])).fit()
"""


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(settings, tmp_path):
    whole, cut = (settings(out=str(tmp_path / name), save_every=3, eval_every=2) for name in ("whole", "cut"))
    fit(whole)
    (tmp_path / "cut.yaml").write_text(cut.to_yaml())
    process = warm.start(["-c", _SLOW_RUN, tmp_path / "cut.yaml"], stdout=subprocess.DEVNULL)
    with killed_at_the_end(process):
        wait_until(lambda: (tmp_path / "cut" / "log.jsonl").exists() and len(steps(cut)) == 5)
        with pytest.raises(CheckpointError, match="another process is training here"):
            fit(cut)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert fit(cut) == "finished"
    assert_same_run(whole, cut)


@contextlib.contextmanager
def killed_at_the_end(process):
    try:
        yield
    finally:
        process.kill()
        process.wait()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_resume_without_one_moment_is_another_run(settings, tmp_path, monkeypatch):
    whole, cut = settings(out=str(tmp_path / "whole")), settings()
    fit(whole)
    StopAt(cut, 4).fit()
    restore = run.restore

    def forgetful(folder, model, optimizer):
        record = restore(folder, model, optimizer)
        optimizer.state[model.blocks[1].ffn.key.weight]["exp_avg"].zero_()
        return record

    monkeypatch.setattr(run, "restore", forgetful)
    fit(cut)
    assert steps(cut)[:5] == steps(whole)[:5]
    assert steps(cut)[5:] != steps(whole)[5:]


def test_a_finished_run_is_left_alone(settings, tmp_path):
    config = settings(max_steps=3)
    fit(config)
    before, said = snapshot(tmp_path / "run"), []
    assert fit(config, say=said.append) == "finished"
    assert snapshot(tmp_path / "run") == before
    assert len(said) == 1
    assert "finished at step 3" in said[0]
    assert "--max_steps" in said[0]


def test_a_finished_run_can_be_made_longer(settings, capsys):
    fit(settings(max_steps=3))
    said = []
    longer = settings(max_steps=5)
    assert fit(longer, say=said.append) == "finished"
    assert [step for step, *_ in steps(longer)] == [1, 2, 3, 4, 5]
    assert any("max_steps was 3 and is 5" in line for line in said)


def test_a_kill_before_the_last_checkpoint_leaves_no_run_that_seems_finished(settings, tmp_path, monkeypatch):
    config = settings(max_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(result, "save", functools.partial(_save_but_the_last, result.save))
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    assert status_of(config) == {"status": "failed", "step": 3, "checkpoint": None}
    assert fit(config) == "finished"
    assert (tmp_path / "run" / "rwkv-final.pth").exists()


def _save_but_the_last(save, model, path):
    if path.name == "rwkv-final.pth":
        raise KeyboardInterrupt
    save(model, path)


def test_a_resume_from_a_path_goes_on_in_a_new_folder(settings, tmp_path):
    whole, first = settings(out=str(tmp_path / "whole")), settings()
    fit(whole)
    StopAt(first, 5).fit()
    before = snapshot(tmp_path / "run")
    for name, start in (("from_run", "run"), ("from_checkpoint", "run/checkpoints/step-00000005")):
        config = settings(out=str(tmp_path / name), resume=str(tmp_path / start))
        assert fit(config) == "finished"
        assert steps(config) == steps(whole)[5:]
        assert_same_weights(weights(config), weights(whole))
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("resume", "words"),
    [("none", ["holds a run already", "--out"]), ("elsewhere", ["elsewhere", "neither a checkpoint nor a run"])],
)
def test_a_used_folder_is_refused(settings, tmp_path, resume, words):
    fit(settings(max_steps=2))
    before = snapshot(tmp_path / "run")
    with pytest.raises(CheckpointError) as caught:
        fit(settings(resume=resume))
    assert all(word in str(caught.value) for word in words)
    assert snapshot(tmp_path / "run") == before


def test_a_resume_from_another_run_does_not_overwrite_this_one(settings, tmp_path):
    fit(settings(max_steps=2))
    fit(settings(max_steps=2, out=str(tmp_path / "other")))
    with pytest.raises(CheckpointError, match="holds another run"):
        fit(settings(resume=str(tmp_path / "other")))


def test_a_damaged_checkpoint_is_passed_over_aloud(settings, tmp_path):
    whole, cut = (settings(out=str(tmp_path / name), save_every=2) for name in ("whole", "cut"))
    fit(whole)
    StopAt(cut, 5).fit()
    (tmp_path / "cut" / "checkpoints" / "step-00000005" / run.MODEL).write_bytes(b"")
    said = []
    fit(cut, say=said.append)
    assert any("step-00000005" in line and "damaged" in line for line in said)
    assert_same_run(whole, cut)


def test_another_architecture_is_refused_by_field(settings, tmp_path):
    fit(settings(max_steps=2))
    before = snapshot(tmp_path / "run")
    for max_steps in (2, 4):
        with pytest.raises(CheckpointError) as caught:
            fit(settings(max_steps=max_steps, model=MODEL.changed(n_layer=3)))
        assert "n_layer 2 (now 3)" in str(caught.value)
        assert "n_embd" not in str(caught.value)
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(lr_init=1e-3), "lr_init was 0.003 and is 0.001"),
        (dict(threads=2), "threads was 1 and is 2"),
        (dict(micro_bsz=4), "micro_bsz was 2 and is 4"),
        (dict(tbptt="4"), "tbptt was not given and is 4"),
        (dict(data="other"), "data was"),
        (dict(tokenizer="integers:256"), "tokenizer was bytes and is integers:256"),
    ],
)
def test_what_is_not_as_it_was_is_said(settings, tmp_path, changes, words):
    StopAt(settings(max_steps=3), 2).fit()
    if "data" in changes:
        (tmp_path / "other.txt").write_text(TEXT[::-1])
        changes = dict(data=str(tmp_path / "other.txt"))
    if "tokenizer" in changes:
        (tmp_path / "other.txt").write_text("1 2 3 4 5 6 7 8 9 " * 60)
        changes["data"] = str(tmp_path / "other.txt")
    said = []
    try:
        fit(settings(max_steps=3, **changes), say=said.append)
    finally:
        torch.set_num_threads(1)
    assert any(line.startswith("resuming, but not bit-exact because " + words) for line in said)


def test_an_equal_resume_says_nothing_of_the_kind(settings):
    StopAt(settings(max_steps=3), 2).fit()
    said = []
    fit(settings(max_steps=3, eval_every=2, sample_every=1), say=said.append)
    assert not any("bit-exact" in line or "jumps" in line for line in said)


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(settings, tmp_path):
    configs = [
        settings(max_steps=3, out=str(tmp_path / name), seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    for config in configs:
        fit(config)
    assert_same_run(configs[0], configs[1])
    assert steps(configs[0])[0] != steps(configs[2])[0]


# -- starting from weights ------------------------------------------------------------------------------------------


def test_a_start_from_weights_warms_up_and_begins_at_their_loss(settings, tmp_path):
    first = settings(max_steps=30, out=str(tmp_path / "first"), sample_every=0)
    fit(first)
    tuned = settings(model=str(tmp_path / "first" / "rwkv-final.pth"), warmup_steps=4, seed=5, accumulate=2)
    fit(tuned)
    losses, rates = ([record[i] for record in steps(tuned)] for i in (1, 3))
    assert rates[:5] == pytest.approx([3e-3 * f for f in (0.01, 0.2575, 0.505, 0.7525, 1.0)])

    corpus = load_corpus(tuned.data, tokenizer.load("bytes"), None, None, 256)
    rows = np.stack([corpus.train[s : s + 33] for s in permuted_starts(len(corpus.train), 32, 5, 0)[:4]])
    rows = torch.from_numpy(rows.astype(np.int64))
    expected = heron.load(first.out).loss(rows[:, :-1], rows[:, 1:])
    assert losses[0] == pytest.approx(expected.item(), abs=1e-5)
    assert losses[0] < 4.5 < steps(first)[0][1]
    init = torch.load(tmp_path / "run" / "rwkv-init.pth", weights_only=True)
    assert_same_weights(init, weights(first))


def test_a_start_from_weights_is_resumed_without_them(settings, tmp_path):
    torch.manual_seed(0)
    heron.save(heron.RWKV(MODEL), tmp_path / "start.safetensors")
    start = str(tmp_path / "start.safetensors")
    whole, cut = settings(model=start, out=str(tmp_path / "whole")), settings(model=start)
    fit(whole)
    StopAt(cut, 3).fit()
    (tmp_path / "start.safetensors").unlink()
    fit(cut)
    assert_same_run(whole, cut)


def test_half_precision_weights_are_trained_in_fp32(settings, tmp_path):
    heron.save(heron.RWKV(MODEL).bfloat16(), tmp_path / "half.pth")
    config = settings(model=str(tmp_path / "half.pth"), max_steps=1)
    fit(config)
    assert {tensor.dtype for tensor in weights(config).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.pth", None, "no such file"),
        ("empty.pth", b"", "empty"),
        ("foreign.pth", b"PK\x03\x04 and more", "not a readable .pth"),
        ("text.txt", b"weights", ".pth, .safetensors, .gguf"),
    ],
)
def test_bad_weights_are_refused_by_file(settings, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        fit(settings(model=str(tmp_path / name)))
    assert name in str(caught.value)
    assert words in str(caught.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


# -- the step -------------------------------------------------------------------------------------------------------


def test_accumulating_equals_a_larger_batch(settings, tmp_path):
    large = settings(micro_bsz=4, out=str(tmp_path / "large"))
    small = settings(micro_bsz=2, accumulate=2)
    for config in (large, small):
        fit(config)
    for one, other in zip(steps(large), steps(small), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert [s[:2] for s in steps(large)][0] == pytest.approx(steps(small)[0][:2], rel=1e-6)


def test_bf16_stays_close_to_fp32_and_keeps_the_weights_in_fp32(settings, tmp_path):
    exact = settings(max_steps=12, out=str(tmp_path / "fp32"))
    rough = settings(max_steps=12, dtype="bf16")
    for config in (exact, rough):
        fit(config)
    losses = [np.array([loss for _, loss, *_ in steps(config)]) for config in (exact, rough)]
    assert np.abs(losses[0] - losses[1]).max() < 0.05
    assert (losses[0] != losses[1]).any()
    assert {tensor.dtype for tensor in weights(rough).values()} == {torch.float32}


def test_bf16_weights_stay_close_to_fp32_over_masters_in_fp32(settings, tmp_path):
    exact = settings(max_steps=12, out=str(tmp_path / "fp32"))
    rough = settings(max_steps=12, dtype="bf16", weights="bf16")
    for config in (exact, rough):
        fit(config)
    losses = [np.array([loss for _, loss, *_ in steps(config)]) for config in (exact, rough)]
    assert 0 < np.abs(losses[0] - losses[1]).max() < 0.05
    masters = weights(rough)
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    name = "blocks.1.ffn.key.weight"
    assert not torch.equal(masters[name], masters[name].bfloat16().float())


def test_a_bf16_network_is_its_masters_rounded_and_hands_them_its_gradients(random_model):
    model = random_model()
    config = heron.TrainConfig(max_steps=1, dtype="bf16", weights="bf16")
    learner = Learner(model, config, torch.device("cpu"))
    network = learner.network
    tokens = torch.arange(36).view(2, 18)
    learner.gradients([(half[None], half[None] + 1) for half in tokens])
    parts = list(zip(network.named_parameters(), model.parameters(), strict=True))
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in model.named_parameters()]
    for (name, copy), master in parts:
        if name.endswith("enn.weight"):
            assert copy is master
        else:
            assert copy.grad is None
            assert torch.equal(copy, master.bfloat16()), name
        assert master.grad is None or master.grad.dtype == torch.float32
    exact = random_model()
    exact.loss(tokens, tokens + 1).backward()
    for (name, _), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        gradient = model.get_parameter(name).grad
        assert (gradient is None) == (other.grad is None), name
        if gradient is not None:
            assert (gradient - other.grad).norm() < 0.1 * other.grad.norm() + 1e-6, name
    before = model.head.weight.detach().clone()
    learner.update(learner.gradients([(tokens, tokens + 1)]), 1e-4, math.inf)
    assert not torch.equal(model.head.weight, before)
    assert all(torch.equal(copy, master.to(copy.dtype)) for (_, copy), master in parts)


def test_recomputing_blocks_changes_no_number(settings, tmp_path, monkeypatch):
    plain, saving = settings(out=str(tmp_path / "plain")), settings(grad_checkpoint=True)
    recomputed, checkpoint = [], rwkv.checkpoint
    monkeypatch.setattr(rwkv, "checkpoint", lambda *a, **k: (recomputed.append(1), checkpoint(*a, **k))[1])
    fit(plain)
    assert not recomputed
    fit(saving)
    assert len(recomputed) == 8 * MODEL.n_layer
    assert_same_run(plain, saving)


def test_tables_on_the_host_begin_as_on_the_device_and_train_only_what_was_seen(settings, tmp_path):
    device, host = settings(out=str(tmp_path / "device")), settings(tables="host", accumulate=2, micro_bsz=1)
    for config in (device, host):
        fit(config)
    assert steps(host)[0] == pytest.approx(steps(device)[0], rel=1e-6)  # the norm counts the rows' gradients
    assert steps(host)[1][1] == pytest.approx(steps(device)[1][1], rel=1e-6)  # no row was left out in the first step
    seen = torch.zeros(256, dtype=torch.bool)
    corpus = load_corpus(host.data, tokenizer.load("bytes"), None, None, 256)
    seen[Batches(corpus.train, 32, 0, "text").batch(0, 16)[0].unique()] = True
    for name, table in weights(host).items():
        if "enn" in name:
            assert torch.equal(table[~seen], torch.ones_like(table[~seen]))
            assert (table[seen] != 1).any(dim=1).all()
    steps_of = safetensors_of(host)["row_step.blocks.1.ffn.enn.weight"]
    assert torch.equal(steps_of > 0, seen)


def safetensors_of(config):
    """What the newest checkpoint holds of the optimizer."""
    return load_file(run.newest(Path(config.out)) / run.OPTIMIZER)


@pytest.mark.parametrize(("before", "after"), [("device", "host"), ("host", "device")])
def test_a_run_whose_tables_were_elsewhere_is_not_resumed(settings, before, after):
    assert StopAt(settings(tables=before), 2).fit() == "preempted"
    with pytest.raises(CheckpointError, match=f"this run trains with --tables {before} --tables_state fp32; give"):
        fit(settings(tables=after))


@pytest.mark.parametrize(("where", "value"), [("loss", math.nan), ("loss", math.inf), ("gradient", math.nan)])
def test_what_is_not_finite_stops_the_run_and_the_checkpoint_before_is_whole(settings, tmp_path, where, value):
    config = settings(save_every=2)
    with pytest.raises(HeronError, match=r"step 4: .*(nan|inf).*sample-6\.safetensors"):
        faulty(heron.Trainer(config), Fault(value, where, forward=4)).fit()
    assert status_of(config) == {"status": "failed", "step": 3, "checkpoint": "step-00000002"}
    assert len(steps(config)) == 3
    assert not (tmp_path / "run" / "rwkv-final.pth").exists()
    assert all(tensor.isfinite().all() for tensor in heron.load(tmp_path / "run").state_dict().values())
    assert fit(config) == "finished"
    assert [step for step, *_ in steps(config)] == list(range(1, 9))


def refusals(config):
    lines = Path(config.out, "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "refused" in record]


@pytest.mark.parametrize("tables", ["device", "host"])
def test_a_skipped_batch_leaves_no_trace_but_its_record_even_over_a_stop(settings, tmp_path, tables):
    options = dict(on_nonfinite="skip", max_steps=6, save_every=2, tables=tables)
    whole, cut = (settings(out=str(tmp_path / name), **options) for name in ("whole", "cut"))
    fault = Fault(math.inf, "gradient", forward=3)
    faulty(heron.Trainer(whole), fault).fit()
    assert faulty(StopAt(cut, 5), fault).fit() == "preempted"  # during its fourth accepted step
    assert fit(cut) == "finished"
    assert_same_run(whole, cut)
    for config in (whole, cut):
        [record] = refusals(config)
        assert (record["step"], record["action"], record["samples"]) == (3, "skipped", [4, 2])
        dumped = load_file(Path(config.out, "bad", "step-00000003-sample-4.safetensors"))
        corpus = load_corpus(config.data, tokenizer.load("bytes"), None, None, 256)
        x, y = Batches(corpus.train, 32, 0, "text").batch(4, 2)
        assert torch.equal(dumped["tokens"], x)
        assert torch.equal(dumped["targets"], y)
    assert run.trainer_of(run.newest(tmp_path / "cut"))["cursor"] == 14


@pytest.mark.parametrize("tables", ["device", "host"])
def test_a_weight_that_stays_bad_sends_the_run_back_once(settings, tables):
    config = settings(on_nonfinite="skip", save_every=2, tables=tables)
    assert faulty(heron.Trainer(config), Fault(math.nan, "weight", forward=6, lasting=True)).fit() == "finished"
    [record] = refusals(config)
    assert (record["step"], record["refused"], record["action"]) == (4, 6, "went back")
    assert [step for step, *_ in steps(config)] == list(range(1, 9))
    assert all(tensor.isfinite().all() for tensor in weights(config).values())
    assert len(report.read_log(config.out)[0]) == 8
    trainer = heron.Trainer(settings(on_nonfinite="skip", out=config.out + "-2"))
    with pytest.raises(HeronError, match="no checkpoint to go back to"):
        faulty(trainer, Fault(math.nan, "weight", forward=2, lasting=True)).fit()


def test_a_spike_is_skipped_and_the_guard_remembers_over_a_stop(settings, tmp_path):
    options = dict(on_nonfinite="skip", spike=3.0, max_steps=24)
    whole, cut = (settings(out=str(tmp_path / name), **options) for name in ("whole", "cut"))
    for config in (whole, cut):
        done = 0
        if config is cut:
            assert StopAt(cut, 18).fit() == "preempted"
            done = 18
        assert faulty(heron.Trainer(config), Fault(5.0, "loss", forward=21 - done)).fit() == "finished"
        assert [record["refused"] for record in refusals(config)] == [21]
    assert_same_run(whole, cut)


def test_max_hours_saves_and_leaves_in_time(settings, tmp_path):
    whole = settings(out=str(tmp_path / "whole"), max_steps=30)
    fit(whole)
    limited = settings(max_steps=30, max_hours=0.0)
    said = []
    while fit(limited, say=said.append) == "preempted":
        done = status_of(limited)
        assert done["checkpoint"] == f"step-{done['step']:08d}"
        limited = dataclasses.replace(limited, max_hours=None if done["step"] >= 3 else 0.0)
    assert done["step"] == 3
    assert_same_run(whole, limited)


def test_num_workers_changes_no_number_and_one_line_says_so(settings, tmp_path):
    without, given, said = settings(out=str(tmp_path / "without")), settings(num_workers=2), []
    fit(without)
    fit(given, say=said.append)
    assert [line for line in said if line.startswith("num_workers")] == [
        "num_workers 2: has no effect any more; leave it out"
    ]
    assert_same_run(without, given)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_sample_is_learned_from_once_and_in_order(settings, monkeypatch, accumulate):
    asked, batch = [], Batches.batch
    monkeypatch.setattr(Batches, "batch", lambda *parts: asked.append(parts[1:3]) or batch(*parts))
    config = settings(accumulate=accumulate)
    assert StopAt(config, 3).fit() == "preempted"
    fit(config)
    assert asked == [(first, 2) for first in range(0, 8 * 2 * accumulate, 2)]


def test_what_a_batch_raises_reaches_the_caller_and_the_same_run_goes_on(settings, tmp_path, monkeypatch):
    whole, cut = (settings(out=str(tmp_path / name), save_every=2) for name in ("whole", "cut"))
    fit(whole)
    batch = Batches.batch

    def damaged(self, first, count, every):
        if first == 10:
            raise DataError("sample 10: the disk is gone")
        return batch(self, first, count, every)

    monkeypatch.setattr(Batches, "batch", damaged)
    with pytest.raises(DataError, match="sample 10: the disk is gone"):
        fit(cut)
    monkeypatch.setattr(Batches, "batch", batch)
    assert status_of(cut) == {"status": "failed", "step": 5, "checkpoint": "step-00000004"}
    assert fit(cut) == "finished"
    assert_same_run(whole, cut)


def test_a_signal_while_a_batch_is_read_lets_its_step_end_and_be_saved(settings, monkeypatch):
    batch = Batches.batch

    def signalled(self, first, count, every):
        if first == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, first, count, every)

    monkeypatch.setattr(Batches, "batch", signalled)
    config = settings()
    assert fit(config) == "preempted"
    assert status_of(config) == {"status": "preempted", "step": 4, "checkpoint": "step-00000004"}


# -- validation -----------------------------------------------------------------------------------------------------


def test_validation_counts_each_target_once(settings):
    config = settings(max_steps=2)
    fit(config)
    model = heron.load(config.out)
    data = TEXT.encode()
    val = torch.tensor(list(data[len(data) - len(data) // 10 :]) + [0])
    total = count = 0
    with torch.no_grad():
        for start in range(0, len(val) - 1, 32):
            window = val[start : start + 33]
            logits, _ = model(window[None, :-1])
            total += F.cross_entropy(logits[0].double(), window[1:], reduction="sum").item()
            count += len(window) - 1
    assert count == len(val) - 1
    [(step, loss, bits)] = validations(config)
    assert step == 2
    assert loss == pytest.approx(total / count, rel=1e-6)
    assert bits == pytest.approx(total / math.log(2) / (len(val) - 2), rel=1e-6)  # the end of document is no byte


def test_own_validation_data_and_none_at_all(settings, tmp_path):
    (tmp_path / "val.txt").write_text("abc " * 30)
    own = settings(max_steps=1, val_data=str(tmp_path / "val.txt"), out=str(tmp_path / "own"))
    fit(own)
    score = evaluate(heron.load(own.out), np.frombuffer(b"abc " * 30 + b"\0", dtype=np.uint8), 32, 119)
    assert validations(own) == [(1, pytest.approx(score.loss), pytest.approx(score.bits_per_byte))]
    none = settings(max_steps=1, val_fraction=0.0, sample_every=1)
    fit(none)
    assert report.read_log(none.out)[1] == []
    assert (tmp_path / "run" / "samples" / "step-00000001.txt").read_text("utf-8", "replace").startswith(TEXT[:32])


def test_an_owed_validation_is_let_go_where_a_run_goes_on_without_validation_data(settings, tmp_path):
    config = settings(eval_every=3)
    assert StopAt(config, 3).fit() == "preempted"
    assert run.trainer_of(run.newest(tmp_path / "run"))["owed"] == ["validation"]
    assert fit(dataclasses.replace(config, val_fraction=0.0)) == "finished"
    assert validations(config) == []


# -- tokenizers, data and their order -------------------------------------------------------------------------------


def test_bpe_is_learned_from_the_training_part_alone_and_kept(settings, tmp_path, text):
    model = MODEL.changed(vocab_size=300)
    config = settings(model=model, tokenizer="bpe:300", max_steps=2, ctx_len=16, out=str(tmp_path / "whole"))
    fit(config)
    kept = (tmp_path / "whole" / "tokenizer.json").read_text(encoding="utf-8")
    assert kept == tokenizer.learn_bpe([TEXT[: len(TEXT) - len(TEXT) // 10]], 300)
    assert kept != tokenizer.learn_bpe([TEXT], 300)

    cut = dataclasses.replace(config, out=str(tmp_path / "cut"))
    StopAt(cut, 1).fit()
    fit(cut)
    assert_same_run(config, cut)

    text.write_text(TEXT[::-1])  # learned anew, it would be another vocabulary
    moved = dataclasses.replace(config, out=str(tmp_path / "moved"), resume=str(tmp_path / "cut"), max_steps=3)
    fit(moved)
    assert (tmp_path / "moved" / "tokenizer.json").read_text(encoding="utf-8") == kept
    with pytest.raises(CheckpointError, match="a tokenizer of 300 ids, not 280"):
        fit(dataclasses.replace(config, tokenizer="bpe:280", max_steps=4))


def test_a_vocabulary_left_by_a_start_that_failed_is_learned_anew(settings, tmp_path, text):
    config = settings(model=MODEL.changed(vocab_size=300), tokenizer="bpe:300", max_steps=1, ctx_len=16)
    with pytest.raises(ConfigError, match="tokenizer bpe:300 has 300 ids, .* 256; set --vocab_size 300"):
        fit(dataclasses.replace(config, model=MODEL))
    text.write_text(TEXT[::-1])
    fit(config)
    expected = tokenizer.learn_bpe([TEXT[::-1][: len(TEXT) - len(TEXT) // 10]], 300)
    assert (tmp_path / "run" / "tokenizer.json").read_text(encoding="utf-8") == expected


def test_a_tokenizer_file_is_kept_and_must_stay_the_same(settings, tmp_path):
    (tmp_path / "tok.json").write_text(tokenizer.learn_bpe([TEXT], 290), encoding="utf-8")
    config = settings(
        model=MODEL.changed(vocab_size=290), tokenizer=str(tmp_path / "tok.json"), max_steps=3, ctx_len=16
    )
    StopAt(config, 1).fit()
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (tmp_path / "tok.json").read_bytes()
    (tmp_path / "tok.json").write_text(tokenizer.learn_bpe([TEXT[:500]], 280), encoding="utf-8")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        fit(config)


@pytest.mark.parametrize("spec", ["bpe:", "bpe:1.5", "bpe:100", "bytez"])
def test_a_tokenizer_that_cannot_be_made_is_refused(settings, spec):
    with pytest.raises(ConfigError, match=spec):
        fit(settings(tokenizer=spec))


def write_binidx(folder, n_tokens, highest=255):
    ids = np.random.default_rng(0).integers(1, highest + 1, n_tokens)
    binidx.write(folder / "data", [ids], 256 if highest < 256 else 65536)
    return str(folder / "data"), ids


def spy(monkeypatch):
    """The first input token of every sample that is trained on, in order."""
    first = []
    loss = heron.RWKV.loss

    def recording(model, tokens, targets):
        first.extend(tokens[:, :4].tolist())
        return loss(model, tokens, targets)

    monkeypatch.setattr(heron.RWKV, "loss", recording)
    return first


def test_binidx_follows_the_cubic_order(settings, tmp_path, monkeypatch, capsys):
    data, ids = write_binidx(tmp_path, 32 * 60)
    prime = magic_prime(len(ids), 32)
    assert prime == 59
    seen = spy(monkeypatch)
    config = settings(data=data, magic_prime=59, max_steps=3)
    fit(config)
    slots = [cubic_slot(1 + sample, prime) for sample in range(6)]
    assert seen == [ids[32 * slot : 32 * slot + 4].tolist() for slot in slots]
    assert report.read_log(config.out)[1] == []  # none is kept for validation unless asked for
    assert "magic prime 59" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_text_follows_the_seeded_permutation(settings, tmp_path, monkeypatch, suffix):
    path = tmp_path / f"data.{suffix}"
    path.write_text(TEXT if suffix == "txt" else json.dumps({"text": TEXT}) + "\n")
    seen = spy(monkeypatch)
    fit(settings(data=str(path), max_steps=3, seed=4))
    data = TEXT.encode()[: len(TEXT) - len(TEXT) // 10] + b"\0"
    starts = permuted_starts(len(data), 32, 4, 0)[:6]
    assert seen == [list(data[start : start + 4]) for start in starts]


@pytest.mark.parametrize(("prime", "resumed", "said"), [(191, 191, ""), (191, None, "191 and is 197"), (None, 197, "")])
def test_any_prime_that_fits_orders_the_samples_and_a_resume_keeps_to_it(
    settings, tmp_path, monkeypatch, capsys, prime, resumed, said
):
    data, ids = write_binidx(tmp_path, 32 * 200 + 1)
    seen = spy(monkeypatch)
    StopAt(settings(data=data, magic_prime=prime), 3).fit()
    capsys.readouterr()
    fit(settings(data=data, magic_prime=resumed))
    primes = [prime or 197] * 6 + [resumed or 197] * 10
    slots = [cubic_slot(1 + sample, prime) for sample, prime in enumerate(primes)]
    assert seen == [ids[32 * slot : 32 * slot + 4].tolist() for slot in slots]
    out = capsys.readouterr().out
    assert (f"not bit-exact because magic_prime was {said}" in out) if said else "bit-exact" not in out


@pytest.mark.parametrize("kind", ["binidx", "text"])
def test_a_prime_that_does_not_fit_is_refused(settings, tmp_path, kind):
    data = write_binidx(tmp_path, 32 * 60)[0] if kind == "binidx" else settings().data
    words = {"binidx": "magic_prime 53, .*0.9 of the 60 samples.* type 59", "text": "text.txt is text.* heron prepare"}
    with pytest.raises(ConfigError, match=words[kind]):
        fit(settings(data=data, magic_prime=53))


def test_ids_that_the_tokenizer_does_not_have_are_found_before_the_first_step(settings, tmp_path):
    data, ids = write_binidx(tmp_path, 32 * 60, highest=299)
    with pytest.raises(DataError, match=f"id {ids[(ids > 255).argmax()]} at position .*vocabulary of 256"):
        fit(settings(data=data, model=MODEL.changed(vocab_size=300)))
    with pytest.raises(ConfigError, match="sample_prompt: .*wanted integers"):
        fit(settings(data=data, model=MODEL.changed(vocab_size=300), tokenizer="integers:300", sample_every=9,
                     sample_prompt="one two"))  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(data="missing.txt"), ["missing.txt", "no such file"]),
        (dict(ctx_len=100_000), ["ctx_len 100000", "at most"]),
        (dict(val_data="missing.txt"), ["missing.txt"]),
        (dict(device="cuda:7"), ["cuda:7"]),
        (dict(device="tpu"), ["tpu"]),
        (dict(model="rwkv8-tinny"), ["rwkv8-tinny"]),
        (dict(model=MODEL.changed(variant="v7"), tables="host"), ["v7 has no DeepEmbed tables"]),
    ],
)
def test_bad_settings_are_one_error_each(settings, changes, words):
    with pytest.raises(HeronError) as caught:
        fit(settings(**changes))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"),
            "a GPU had no 2.50 GiB left",
        ),
        (MemoryError("Unable to allocate 3.5 TiB for an array"), "the host had no 3.5 TiB left"),
        (None, r"the host had no 1,048,576.00 GiB \(1125899906842624 bytes\) left"),
    ],
)
def test_where_memory_runs_out_the_knobs_are_named(settings, monkeypatch, error, said):
    def loss(*_):
        if error is not None:
            raise error
        return torch.empty(1 << 50, dtype=torch.uint8)

    monkeypatch.setattr(heron.RWKV, "loss", loss)
    knobs = "--grad_checkpoint, or --micro_bsz 1 --accumulate 2, or --tables host, or --dtype bf16, or --ctx_len 16;"
    with pytest.raises(HeronError, match=f"^out of memory: {said}. Try {knobs} heron estimate"):
        fit(settings())


def test_another_error_of_torch_stays_what_it_is(settings, monkeypatch):
    monkeypatch.setattr(heron.RWKV, "loss", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        fit(settings())


def test_a_folder_that_cannot_be_written_is_named(settings, text):
    with pytest.raises(CheckpointError, match="text.txt"):
        fit(settings(out=str(text / "run")))


def test_decisions_are_written_down(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    said = heron.Trainer(settings(dtype="auto", device="cpu", threads=0)).config
    assert (said.dtype, said.device, said.threads) == ("bf16", "cpu", torch.get_num_threads())
    assert heron.Trainer(settings(model="rwkv8-tiny")).config.model == heron.ModelConfig.preset("rwkv8-tiny")


@pytest.mark.parametrize(
    ("fault", "on_nonfinite"),
    [
        (Fault(math.nan, "loss", forward=5), "rewind"),
        (Fault(math.inf, "gradient", forward=3), "skip"),
        (Fault(math.nan, "weight", forward=6, lasting=True), "skip"),
    ],
)
def test_a_bad_step_that_is_read_late_as_on_a_gpu_leaves_no_trace_either(
    settings, tmp_path, monkeypatch, fault, on_nonfinite
):
    options = dict(on_nonfinite=on_nonfinite, save_every=2)
    at_once, late = (settings(out=str(tmp_path / name), **options) for name in ("at-once", "late"))
    faulty(heron.Trainer(at_once), fault).fit()
    monkeypatch.setattr(train.Trainer, "_waits", lambda self, parts, step: self._due(parts, step))
    faulty(heron.Trainer(late), fault).fit()
    assert_same_run(at_once, late)
    assert [record["action"] for record in refusals(late)] == [record["action"] for record in refusals(at_once)]


def test_tokens_are_counted_over_a_change_of_the_batch(settings):
    config = settings(max_steps=4, micro_bsz=2)
    fit(config)
    fit(dataclasses.replace(config, max_steps=6, micro_bsz=3))
    logged = [record["tokens"] for record in report.read_log(config.out)[0]]
    assert logged == [config.ctx_len * samples for samples in (2, 4, 6, 8, 11, 14)]


def test_samples_of_integers_are_numbers_apart(settings, tmp_path, capsys):
    data = tmp_path / "numbers.txt"
    data.write_text(" ".join(str(7 * n % 100) for n in range(900)))
    numbers = dict(data=str(data), tokenizer="integers:100", max_steps=2, sample_every=1, sample_tokens=6)
    fit(settings(**numbers, model=dataclasses.replace(MODEL, vocab_size=100)))
    shown = capsys.readouterr().out
    text = (tmp_path / "run" / "samples" / "step-00000002.txt").read_text()
    ids = list(map(int, text.split()))
    assert len(ids) == 32 + 6
    assert text == " ".join(map(str, ids))
    assert " ".join(map(str, ids[-8:])) in shown  # what the model says, and not the prompt alone
    with pytest.raises(ConfigError, match="sample_prompt: .*'hello'"):
        fit(
            settings(
                **numbers,
                model=dataclasses.replace(MODEL, vocab_size=100),
                sample_prompt="hello",
                out=str(data.parent / "b"),
            )
        )
