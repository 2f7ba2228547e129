"""Batches from workers: the same as without, in order; and no worker is left, however the run ends."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch

from heron.data.background import Stream
from heron.data.loader import Batches

TOKENS = np.arange(2000, dtype=np.uint16)


def stream(workers, first=6, stopped=lambda: None):
    return Stream(Batches(TOKENS, 16, 3, "text"), first, 4, workers, stopped)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_batch_in_order(workers):
    batches = Batches(TOKENS, 16, 3, "text")
    with stream(workers) as taken:
        for first in range(6, 6 + 4 * 10, 4):
            assert taken.next_sample == first
            for got, wanted in zip(taken.take(), batches.batch(first, 4), strict=True):
                assert got.dtype == torch.int64
                assert torch.equal(got, wanted)


def test_workers_live_through_signals_and_go_when_the_stream_is_closed():
    with stream(2) as taken:
        pids = [process.pid for process in taken._processes]
        for pid in pids:  # at once, and with what the signals do by default in the parent
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(pid, number)
        for _ in range(6):
            assert taken.take() is not None
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_go_when_their_parent_is_killed():
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        taken = stream(2)
        os.write(writing, " ".join(str(process.pid) for process in taken._processes).encode())
        taken.take()
        os.kill(os.getpid(), signal.SIGKILL)
    pids = [int(pid) for pid in os.read(reading, 100).split()]
    os.waitpid(parent, 0)
    os.close(reading)
    os.close(writing)
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}/fd/0") for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(pids) == 2


def test_a_wait_for_data_ends_when_the_run_is_asked_to_stop(monkeypatch):
    monkeypatch.setattr(Batches, "batch", lambda *_: time.sleep(9))
    answers = iter([None, "SIGTERM"])
    with stream(1, stopped=lambda: next(answers)) as taken:
        begun = time.monotonic()
        assert taken.take() is None
        assert time.monotonic() - begun < 0.9
    assert time.monotonic() - begun < 1.9  # and its worker, busy for seconds, is not waited for
