"""kill -9 at random instants of a real `heron train`: the run that goes on is bit-equal to one never stopped.

A trial counts when the kill came before the end; nine in ten come after the first checkpoint. The control drops one
moment, or the data cursor, from what a resume takes up: every curve of a run that was killed after its first checkpoint
must then differ.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch

from heron import report
from heron.checkpoint import run as checkpoints_of
from heron.config import TrainConfig
from tests.torture import minute
from tests.torture.result import Result

AFTER_FIRST = 5 / 6  # of the kills must come after the first checkpoint
CONTROLS = 10  # one control for so many trials


def run(trials: int, seed: int, **changes: object) -> Result:
    """`trials` kills, each of a run of its own, with `changes` of the settings of :mod:`tests.torture.minute`."""
    draw, failures, checkpoints = random.Random(seed), [], []
    with tempfile.TemporaryDirectory(prefix="heron-kills-") as name:
        folder = Path(name)
        reference = minute.reference(folder, **changes)
        life = _Life.of(reference)
        for trial in range(trials):
            settings = minute.config(folder, **changes, out=str(folder / f"run-{trial}"))
            checkpoints.append(_killed(settings, folder, draw, life))
            problem = _goes_on(settings, reference, folder)
            if problem:
                failures.append(f"trial {trial}, {checkpoints[-1]} checkpoints: {problem}")
            shutil.rmtree(settings.out)
        after_first = sum(count > 0 for count in checkpoints)
        if trials >= 30 and after_first < AFTER_FIRST * trials:
            failures.append(f"only {after_first} of {trials} kills came after the first checkpoint")
        controls = max(2, trials // CONTROLS)
        caught = 0
        for number, forget in zip(range(controls), itertools.cycle((forget_a_moment, _forget_the_cursor))):
            settings = minute.config(folder, **changes, out=str(folder / f"control-{number}"))
            last = Path(settings.out, "checkpoints", f"step-{settings.max_steps:08d}")
            while not _killed(settings, folder, draw, life) or last.exists():  # something must be left to do
                shutil.rmtree(settings.out, ignore_errors=True)
            minute.wait(minute.train_in_child(settings, folder, forget))
            caught += minute.curve(settings) != minute.curve(reference)
    return Result(
        "kill -9 at random instants of `heron train`: the curve is bit-equal",
        trials,
        300,
        failures,
        "one moment or the data cursor forgotten: the curve differs",
        caught,
        controls,
        f"{after_first} after the first checkpoint",
    )


@dataclasses.dataclass
class _Life:
    """How long a run takes here and now, in seconds: to its first checkpoint, and from there to its end."""

    start: float
    rest: float

    @classmethod
    def of(cls, run: TrainConfig) -> _Life:
        """That of a finished run."""
        times = [record["time"] for record in report.read_log(Path(run.out))[0]]
        first = times[run.save_every - 1]
        return cls(first, times[-1] - first)


def _killed(settings: TrainConfig, folder: Path, draw: random.Random, life: _Life) -> int:
    """Kill a fresh run at a random instant; how many checkpoints it had. One in ten is killed while it starts."""
    while True:
        begun = time.monotonic()
        early = draw.random() < 0.1
        pid = minute.train_in_child(settings, folder)
        if early:
            time.sleep(draw.random() * life.start)
        else:
            while not _checkpoints(settings) and time.monotonic() < begun + minute.SECONDS:
                time.sleep(0.001)
            life.start = time.monotonic() - begun
            time.sleep(draw.random() * life.rest)
        done, _ = os.waitpid(pid, os.WNOHANG)
        if not done:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            life.rest *= 1.01
            return _checkpoints(settings)
        life.rest *= 0.9  # it was over
        shutil.rmtree(settings.out)


def _checkpoints(settings: TrainConfig) -> int:
    return len(list(Path(settings.out, "checkpoints").glob("step-*")))


def _goes_on(settings: TrainConfig, reference: TrainConfig, folder: Path) -> str | None:
    code = minute.wait(minute.train_in_child(settings, folder))
    if code != 0:
        return f"the resume ended with {code}: {minute.said(folder)}"
    return None if minute.same(settings, reference) else "the curve or the weights differ"


def forget_a_moment() -> None:
    restore = checkpoints_of.restore

    def forgetful(folder, model, optimizer):
        record = restore(folder, model, optimizer)
        largest = max(optimizer.state, key=torch.numel)
        optimizer.state[largest]["exp_avg"].zero_()
        return record

    checkpoints_of.restore = forgetful


def _forget_the_cursor() -> None:
    restore = checkpoints_of.restore
    checkpoints_of.restore = lambda *parts: {**restore(*parts), "cursor": 0}
