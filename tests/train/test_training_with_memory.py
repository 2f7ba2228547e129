"""Training with ROSA memory: every window reads the memory of its place in the corpus, and nothing after it."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import heron
from heron import cli
from heron.config import ModelConfig, RosaConfig, TrainConfig
from heron.data.loader import Batches, load_corpus
from heron.data.recalled import Recalled, Rules, answers
from heron.evaluate import evaluate
from heron.ops.rosa import TokenStream
from heron.train import run_data

TEXT = "".join(f"Line {n} of a text that repeats itself, {n % 7} times {n % 5}.\n" for n in range(60))
SIZES = "--n_layer 1 --n_embd 32 --head_size 16 --ctx_len 16 --micro_bsz 2 --device cpu --dtype fp32 --threads 1"
QUIET = "--sample_every 0 --eval_every 0 --lr_init 1e-2 --lr_final 1e-3 --warmup_steps 1"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def corpus_of(path):
    return load_corpus(str(path), heron.tokenizer.load("bytes"), None, None, 256)


def run(*words):
    return cli.main(" ".join(map(str, words)).split())


def test_every_window_has_what_the_stream_finds_at_its_place_in_the_corpus(text):
    tokens = corpus_of(text).train
    found = answers(tokens, Rules(max_match=8, n_matches=2))
    src, length = TokenStream(8).read(torch.from_numpy(tokens.astype(np.int64)), 2)
    for kind, ctx_len in (("text", 16), ("binidx", 16)):
        batches = Batches(tokens, ctx_len, 3, kind, None, found)
        for first in (0, batches.order.samples_per_epoch, 5):
            x, _, recalled = batches.batch(first, 4)
            starts = batches.order.starts(first, 4)
            for row, start in enumerate(starts):
                assert torch.equal(x[row], torch.from_numpy(tokens[start : start + ctx_len].astype(np.int64)))
                assert torch.equal(recalled[row, :, :, 1], length[start : start + ctx_len])
                ends = src[start : start + ctx_len]
                predicted = torch.from_numpy(tokens.astype(np.int64))[(ends + 1).clamp(min=0)]
                assert torch.equal(recalled[row, :, :, 0], torch.where(ends >= 0, predicted, 0))


def test_training_sees_nothing_of_validation_and_validation_nothing_after_its_token(text):
    corpus = corpus_of(text)
    config = TrainConfig(data=str(text), tokenizer="bytes", max_steps=1)
    of_train, of_val = run_data.recollections(config, RosaConfig.preset("memory"), corpus)
    assert (len(of_train), len(of_val)) == (len(corpus.train), len(corpus.val))
    for cut in (1, 30, len(corpus.val) - 1):
        other = corpus.val.copy()
        other[cut:] = 1
        changed = dataclasses.replace(corpus, val=other)
        of_train_2, of_val_2 = run_data.recollections(config, RosaConfig.preset("memory"), changed)
        assert np.array_equal(of_train.records, of_train_2.records)
        assert np.array_equal(of_val.records[:cut], of_val_2.records[:cut])
        assert not np.array_equal(of_val.records, of_val_2.records)
    alone = answers(corpus.val, Rules())
    assert not np.array_equal(alone.records, of_val.records), "validation looks back on training, too"


def test_a_run_with_memory_learns_more_and_goes_on_bit_for_bit(text, tmp_path, capsys):
    train = f"train {SIZES} {QUIET} --data {text} --tokenizer bytes --max_steps 30"
    assert run(train, "--out", tmp_path / "none") == 0
    assert run(train, "--rosa memory --out", tmp_path / "whole") == 0
    out = capsys.readouterr().out
    assert "looks back on the training tokens before it; validation, on all of these and its own before it" in (
        " ".join(out.split())
    )
    losses = {
        name: [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()][-1]["val_loss"]
        for name in ("none", "whole")
    }
    assert losses["whole"] < losses["none"] - 0.5

    halves = tmp_path / "halves"
    assert run(train.replace("--max_steps 30", "--max_steps 30 --save_every 13"), "--rosa memory --out", halves) == 0
    for checkpoint in (halves / "checkpoints").iterdir():
        if not checkpoint.name.endswith("13"):
            shutil.rmtree(checkpoint)
    (halves / "rwkv-final.pth").unlink()
    assert run("train --out", halves) == 0
    assert "not bit-exact" not in capsys.readouterr().out
    one, other = (torch.load(tmp_path / name / "rwkv-final.pth") for name in ("whole", "halves"))
    assert one.keys() == other.keys() >= {"memory.scale", "memory.length", "memory.copy"}
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["memory.copy"].abs().max() > 0.1


def test_a_binidx_has_its_memory_beside_it(text, tmp_path, capsys):
    prefix = tmp_path / "set"
    assert run("prepare", text, "--tokenizer bytes --eod 0 --out", prefix) == 0
    train = f"train {SIZES} {QUIET} --data {prefix} --tokenizer bytes --rosa memory --max_steps 2 --val_fraction 0.2"
    capsys.readouterr()
    assert run(train, "--out", tmp_path / "run") == 1
    error = capsys.readouterr().err.strip()
    assert f"type heron prepare {prefix} --memory" in " ".join(error.split())
    assert "Traceback" not in error
    assert run("prepare", prefix, "--memory") == 0
    assert run(train, "--out", tmp_path / "run") == 0


def test_evaluation_finds_by_itself_what_training_gave_it(text):
    torch.manual_seed(0)
    model = heron.RWKV(ModelConfig(variant="v8", n_layer=1, n_embd=32, head_size=16, vocab_size=256, memory="memory"))
    with torch.no_grad():
        model.memory.copy.normal_()
    tokens = corpus_of(text).train[:300]
    found = answers(tokens, Rules())
    for ctx_len in (16, 300, 37):
        assert evaluate(model, tokens, ctx_len) == evaluate(model, tokens, ctx_len, recalled=found)
    leaking = Recalled(np.roll(found.records, -1, axis=0))
    assert evaluate(model, tokens, 16, recalled=leaking) != evaluate(model, tokens, 16)
