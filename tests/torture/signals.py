"""A signal at any moment of a run: within 5 s it is saved and gone with code 75, and nothing of it is left running.

SIGTERM, SIGINT and SIGUSR1, to the process or to its whole group (as a batch system sends them), in each phase: while
the data are read, in a forward pass, between two forward passes of one step, while a slow disk gives a batch, in a
validation, in a sample, and in a save. A tenth of the trials send a second signal, which may end the process at once
and must leave the newest checkpoint whole. The control obeys a signal at once, in the middle of a step.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

from heron import cli
from heron.checkpoint import run as checkpoints
from heron.config import TrainConfig
from heron.data import loader
from heron.errors import HeronError
from heron.train import due, run_data, stop
from heron.train import loop as train
from tests.torture import minute
from tests.torture.result import Result

SECONDS = 5.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PHASES = {  # name -> (object, function that begins the phase, which of its calls)
    "data": (run_data, "load_corpus", 1),
    "forward": (train.machine, "autocast", 9),
    "accumulation": (train.machine, "autocast", 10),
    "batch": (loader.Batches, "batch", 5),
    "validation": (due, "evaluate", 1),
    "sample": (due, "generate", 1),
    "save": (checkpoints, "write", 2),
}


def run(trials: int, seed: int) -> Result:
    """Send a signal to `trials` runs."""
    draw, failures, slowest = random.Random(seed), [], 0.0
    with tempfile.TemporaryDirectory(prefix="heron-signals-") as name:
        folder = Path(name)
        minute.reference(folder)
        cases = list(itertools.product(PHASES, ("process", "group")))
        for trial in range(trials):
            phase, target = cases[trial % len(cases)]
            number, twice = draw.choice(SIGNALS), trial % 10 == 9
            seconds, problem = _trial(folder, phase, target, number, twice)
            slowest = max(slowest, seconds)
            if problem:
                failures.append(f"{number.name} to the {target} in {phase}: {problem}")
        controls = max(2, trials // 20)
        with minute.replaced(stop.Preemption, "begin", lambda self: None):
            caught = sum(
                _trial(folder, "forward", "group", signal.SIGTERM, False)[1] is not None for _ in range(controls)
            )
    return Result(
        "a signal in any phase: saved, status right, nothing left running",
        trials,
        100,
        failures,
        "a signal is obeyed in the middle of a step: nothing is saved",
        caught,
        controls,
        f"slowest exit {slowest:.1f} s",
    )


def _trial(folder: Path, phase: str, target: str, number: signal.Signals, twice: bool) -> tuple[float, str | None]:
    """Seconds from the signal to the end, and what went wrong."""
    settings = minute.config(
        folder, out=str(folder / "signalled"), accumulate=2, max_steps=5000, eval_every=4,
        sample_every=3, sample_tokens=50,
    )  # fmt: skip
    shutil.rmtree(settings.out, ignore_errors=True)
    sent_at = folder / "sent"
    sent_at.unlink(missing_ok=True)
    arguments = minute.command(settings, folder)

    def send() -> None:
        sent_at.write_text(repr(time.monotonic()))
        for _ in range(1 + twice):
            os.kill(os.getpid(), number) if target == "process" else os.killpg(os.getpgrp(), number)
            time.sleep(0.01)

    def work() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        train.plot = lambda *_: None
        holder, function, call = PHASES[phase]
        original, count = getattr(holder, function), itertools.count(1)

        def at_the_phase(*parts, **options):
            if next(count) == call:
                threading.Thread(target=send).start()
            return original(*parts, **options)

        setattr(holder, function, at_the_phase)
        if phase == "batch":
            loader.Batches.batch = _slow(loader.Batches.batch)
        return cli.main(arguments)

    pid = minute.child(work, folder / "output.txt")
    code = minute.wait(pid)
    seconds = time.monotonic() - float(sent_at.read_text()) if sent_at.exists() else float("inf")
    return seconds, _problem(settings, folder, phase, code, seconds, pid, number, twice)


def _problem(
    settings: TrainConfig,
    folder: Path,
    phase: str,
    code: int | None,
    seconds: float,
    pid: int,
    number: int,
    twice: bool,
) -> str | None:
    left = _wait_for_group(pid)
    if left:
        return f"{left} processes were left"
    if seconds > SECONDS:
        return f"it took {seconds:.1f} s"
    out = Path(settings.out)
    try:
        newest = checkpoints.newest(out) if out.exists() else None
        step = checkpoints.trainer_of(newest)["step"] if newest else None
    except HeronError as error:
        return f"the checkpoint: {error}"
    if twice and code in (-number, 130):
        return None
    if code != 75:
        return f"exit code {code}: {minute.said(folder)}"
    before_the_first_step = phase == "data"
    wanted = {"status": "preempted", "step": step or 0, "checkpoint": newest.name if newest else None}
    if minute.status(settings) != wanted or (step is None) != before_the_first_step:
        return f"status {minute.status(settings)}, wanted {wanted}"
    if before_the_first_step:
        return None
    logged = [record[0] for record in minute.curve(settings)[0]]
    return None if logged == list(range(1, step + 1)) else f"saved step {step}, logged {logged[-1:]}"


def _wait_for_group(group: int) -> int:
    """How many processes of a group are still there when all had a second to go."""
    deadline = time.monotonic() + 1
    while _members(group) and time.monotonic() < deadline:
        time.sleep(0.01)
    return _members(group)


def _members(group: int) -> int:
    count = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it went while we looked
        count += int(fields[2]) == group and fields[0] != "Z"
    return count


def _slow(batch):
    def slowly(*parts):
        time.sleep(0.4)
        return batch(*parts)

    return slowly
