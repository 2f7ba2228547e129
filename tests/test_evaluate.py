"""The score of a text against sums that are written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from heron import evaluate as module
from heron import machine
from heron.errors import ConfigError, DataError
from heron.evaluate import evaluate


def literal(model, tokens, ctx_len):
    """Summed nats of every target, one window at a time, from the logits."""
    total = 0.0
    for start in range(0, len(tokens) - 1, ctx_len):
        window = torch.from_numpy(tokens[start : start + ctx_len + 1].astype(np.int64))
        with torch.no_grad():
            logits, _ = model(window[None, :-1])
        total += F.cross_entropy(logits[0].double(), window[1:], reduction="sum").item()
    return total


@pytest.mark.parametrize("n_tokens", [2, 8, 9, 10, 17, 60])
@pytest.mark.parametrize("ctx_len", [1, 8, 100])
def test_each_target_counts_once(random_model, monkeypatch, n_tokens, ctx_len):
    monkeypatch.setattr(module, "_TOKENS_PER_PASS", 24)  # three windows of 8 in a pass: the last pass is a part
    model = random_model()
    tokens = np.random.default_rng(n_tokens).integers(0, 37, n_tokens).astype(np.uint16)
    score = evaluate(model, tokens, ctx_len, n_bytes=3 * (n_tokens - 1))
    total = literal(model, tokens, ctx_len)
    assert score.n_targets == n_tokens - 1
    assert score.loss == pytest.approx(total / (n_tokens - 1), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / (3 * (n_tokens - 1)), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.loss))


def test_windows_start_from_a_zero_state(random_model):
    model = random_model()
    tokens = np.random.default_rng(0).integers(0, 37, 9)
    again = np.concatenate([tokens, tokens[1:]])  # the second window begins with the last target of the first
    halves = evaluate(model, tokens, 8).loss, evaluate(model, again[8:], 8).loss
    assert evaluate(model, again, 8).loss == pytest.approx(sum(halves) / 2, rel=1e-6)


def test_without_bytes_there_are_no_bits_per_byte(random_model):
    assert evaluate(random_model(), np.arange(9), 4).bits_per_byte is None


def test_the_model_is_left_as_it_was(random_model):
    model = random_model().train()
    evaluate(model, np.arange(9), 4)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


def test_the_precision_of_the_run_is_used(random_model):
    model, tokens = random_model(), np.random.default_rng(0).integers(0, 37, 50)
    exact = evaluate(model, tokens, 16).loss
    rough = evaluate(model, tokens, 16, autocast=machine.autocast("bf16", torch.device("cpu"))).loss
    assert exact != rough
    assert exact == pytest.approx(rough, rel=0.02)


@pytest.mark.parametrize("tokens", [[], [3]])
def test_too_short_a_text_is_refused(random_model, tokens):
    with pytest.raises(DataError, match=f"at least 2 tokens, got {len(tokens)}"):
        evaluate(random_model(), np.array(tokens, dtype=np.int64), 4)


def test_an_id_outside_the_vocabulary_is_refused(random_model):
    with pytest.raises(DataError, match="vocab_size 37"):
        evaluate(random_model(), np.array([1, 2, 37, 3]), 4)


def test_a_window_without_length_is_refused(random_model):
    with pytest.raises(ConfigError, match="ctx_len: wanted at least 1, got 0"):
        evaluate(random_model(), np.arange(9), 0)
