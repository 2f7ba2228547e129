"""The verdict over a step, what follows from it, and when a run has to stop; each against numbers written out."""

from __future__ import annotations

import math
import os
import signal
import statistics
import time

import pytest
import torch

import heron
from heron.ops.global_norm import verdict
from heron.train.guard import Guard
from heron.train.stop import Preemption


@pytest.mark.parametrize(
    ("loss", "norm", "limit", "bad"),
    [
        (2.0, 1.0, math.inf, 0),
        (math.nan, 1.0, math.inf, 1),
        (math.inf, 1.0, math.inf, 1),
        (-math.inf, 1.0, math.inf, 1),
        (2.0, math.nan, math.inf, 1),
        (2.0, math.inf, math.inf, 1),
        (2.0, 1.0, 2.0, 0),
        (2.01, 1.0, 2.0, 1),
    ],
)
def test_what_is_bad(loss, norm, limit, bad):
    assert verdict(torch.tensor(loss), torch.tensor(norm), limit, 1.0)[0].item() == bad


def test_an_update_of_a_bad_step_lands_nowhere(random_model):
    model = random_model()
    optimizer = heron.build_optimizer(model)
    tokens = torch.arange(36).view(2, 18)

    def step(bad):
        model.loss(tokens, tokens + 1).backward()
        if bad:
            model.head.weight.grad.fill_(math.nan)
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        optimizer.zero_grad()

    step(bad=False)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [{part: value.clone() for part, value in state.items()} for state in optimizer.state.values()]
    step(bad=True)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for state, before in zip(optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(state[part], before[part]) for part in before)
    step(bad=False)
    assert not torch.equal(model.head.weight, weights["head.weight"])


def test_the_limit_is_that_of_accepted_losses_alone():
    guard = Guard("skip", spike=4.0)
    losses = [3.0 + 0.1 * (i % 7) for i in range(40)]
    for loss in losses[:15]:
        assert guard.limit() == math.inf
        guard.accept(loss)
    for loss in losses[15:]:
        guard.accept(loss)
    median = statistics.median(losses)
    deviation = statistics.median(abs(loss - median) for loss in losses)
    assert guard.limit() == pytest.approx(median + 4.0 * 1.4826 * deviation)
    for _ in range(5):
        assert guard.refuse(weights_are_finite=True) == ("skip", "on_nonfinite is skip")
    assert guard.state()["losses"] == losses
    for _ in range(200):
        guard.accept(2.0)
    assert guard.limit() == pytest.approx(2.0 * (1 + 4.0 * 0.01))  # an even stretch: a hundredth of the median


def test_without_a_spike_setting_any_finite_loss_passes():
    guard = Guard("skip", spike=0.0)
    for _ in range(40):
        guard.accept(1.0)
    assert guard.limit() == math.inf


def test_what_a_bad_step_leads_to():
    assert Guard("stop", 0.0).refuse(True)[0] == "stop"
    assert Guard("skip", 0.0).refuse(False)[0] == "rewind"
    guard = Guard("rewind", 0.0)
    assert [guard.refuse(True)[0] for _ in range(4)] == ["rewind", "rewind", "rewind", "stop"]


def test_more_than_ten_skips_among_a_hundred_batches_stop():
    guard = Guard("skip", 0.0)
    for _ in range(20):  # every tenth batch is bad: just bearable
        assert guard.refuse(True)[0] == "skip"
        for _ in range(9):
            guard.accept(1.0)
    assert guard.refuse(True)[0] == "skip"
    action, reason = guard.refuse(True)
    assert (action, reason) == ("stop", "more than 10 of 100 batches were bad")


def test_a_guard_that_is_restored_goes_on_as_the_first_would():
    first, second = Guard("rewind", 3.0), Guard("rewind", 3.0)
    for i in range(150):
        first.accept(2.0 + i % 3)
        if i % 50 == 0:
            first.refuse(True)
    second.restore(first.state())
    assert second.state() == first.state()
    assert second.limit() == first.limit() < math.inf
    assert second.refuse(True) == first.refuse(True) == ("stop", "it went back 3 times already")


@pytest.mark.parametrize(("name", "needed"), [("SIGTERM", 2), ("SIGINT", 3), ("SIGUSR1", 2)])
def test_the_first_signal_is_noted_and_the_last_one_needed_does_what_it_did_before(name, needed):
    number, seen = getattr(signal, name), []
    before = signal.signal(number, lambda *_: seen.append(name))
    try:
        with Preemption(say=lambda line: None) as stop:
            stop.begin()
            assert stop.reason is None
            for _ in range(needed - 1):
                os.kill(os.getpid(), number)
                assert (stop.reason, seen) == (name, [])
            os.kill(os.getpid(), number)
            assert seen == [name]
        os.kill(os.getpid(), number)
        assert seen == [name, name]
    finally:
        signal.signal(number, before)


def test_max_hours_leaves_room_for_one_more_step_and_a_save(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = Preemption(max_hours=0.01)  # 36 s
    for length, expected in [(5, None), (1, None), (10, None), (1, "--max_hours 0.01")]:
        now[0] += length  # 5, 6, 16, 17 s: 19 are left, fewer than twice the longest step
        stop.step_ended()
        assert stop.reason == expected
