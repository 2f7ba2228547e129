"""kill -9 of one of several processes at random instants, under torchrun's engine, which starts all of them anew.

Nobody helps: the run must go on from the newest checkpoint, which is whole, and end with the bits of one that was never
disturbed. The kills fall into the start, steps, validations and saves, which threads write while steps go on. The
control forgets one moment when it goes on.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from heron import cli
from heron.checkpoint import run as checkpoints
from heron.config import TrainConfig
from heron.errors import CheckpointError
from heron.train import due, resume
from heron.train import loop as train
from tests.torchrun import torchrun
from tests.torture import kills, minute
from tests.torture.result import Result

TIMEOUT = 15  # --dist_timeout
SECONDS = TIMEOUT + 35.0  # from the kill to the end of the run that went on
PHASES = {"step": 8, "validation": 3, "save": 4}  # of each how many a run has; before them comes the start
LAYOUTS = ((2, "ddp"), (2, "fsdp"), (2, "ddp"), (2, "fsdp"), (4, "fsdp"))
CONTROLS = 10  # one control for so many trials
_DIFFERS = "the curve or the weights differ"
_PID = len(PHASES)  # where the board has a process's id, behind how often it has begun each phase


def run(trials: int, seed: int) -> Result:
    """`trials` kills, each of a run of its own."""
    draw, failures, killed, slowest, after_first = random.Random(seed), [], Counter(), 0.0, 0
    with tempfile.TemporaryDirectory(prefix="heron-ranks-") as name:
        folder = Path(name)
        references = {layout: _undisturbed(folder, *layout) for layout in set(LAYOUTS[:trials])}
        for trial, layout, phase in zip(range(trials), itertools.cycle(LAYOUTS), itertools.cycle(("start", *PHASES))):
            settings = _settings(folder, f"run-{trial}", *layout)
            seconds, problem = _goes_on(settings, layout[0], phase, draw, references[layout])
            killed[phase] += 1
            slowest = max(slowest, seconds)
            after_first += _resumed(settings)[1] is not None
            if problem:
                failures.append(f"trial {trial}, {layout}, in {phase}: {problem}")
            shutil.rmtree(settings.out)
        controls, caught = max(1, trials // CONTROLS), 0
        for number in range(controls):
            settings = _settings(folder, f"control-{number}", *LAYOUTS[0])
            problem = None
            while _resumed(settings)[1] in (None, f"step-{settings.max_steps:08d}"):  # something must be left to do
                shutil.rmtree(settings.out, ignore_errors=True)
                _, problem = _goes_on(settings, 2, "validation", draw, references[LAYOUTS[0]], kills.forget_a_moment)
            caught += problem == _DIFFERS
    return Result(
        "kill -9 of one of 2 or 4 processes: restarted by torchrun, the run ends bit-equal",
        trials,
        60,
        failures,
        "one moment forgotten: the curve differs",
        caught,
        controls,
        f"{', '.join(f'{n} in a {phase}' for phase, n in killed.items())}; {after_first} went on from a checkpoint; "
        f"{slowest:.0f} s from kill to end at most",
    )


class _Board:
    """What processes that were forked tell of themselves: their ids, and how often each has begun each phase."""

    def __init__(self, processes: int):
        self._cells = np.frombuffer(mmap.mmap(-1, 8 * processes * (_PID + 1)), np.int64).reshape(processes, _PID + 1)

    def begin(self, rank: int) -> None:
        self._cells[rank] = 0
        self._cells[rank, _PID] = os.getpid()

    def count(self, rank: int, phase: str, function: Callable) -> Callable:
        """`function`, which first notes that the process with that rank begins a phase."""

        def counted(*given: object, **named: object) -> object:
            self._cells[rank, list(PHASES).index(phase)] += 1
            return function(*given, **named)

        return counted

    def pid(self, rank: int) -> int:
        return int(self._cells[rank, _PID])

    def begun(self, rank: int, phase: str) -> int:
        return int(self._cells[rank, list(PHASES).index(phase)])


def _settings(folder: Path, name: str, processes: int, parallel: str) -> TrainConfig:
    model = minute.MODEL if parallel == "ddp" else minute.MODEL.changed(variant="v7")  # tables are not sharded
    return minute.config(
        folder, model=model, out=str(folder / name), parallel=parallel, processes=processes, micro_bsz=4 // processes,
        max_steps=8, save_every=2, eval_every=3, sample_every=0, background_save="on", dist_timeout=TIMEOUT,
    )  # fmt: skip


def _undisturbed(folder: Path, processes: int, parallel: str) -> TrainConfig:
    settings = _settings(folder, f"{parallel}-{processes}", processes, parallel)
    code = minute.wait(_torchrun(settings, processes, _Board(processes)))
    if code != 0:
        raise RuntimeError(f"the undisturbed run ended with {code}: {minute.said(folder)}")
    return settings


def _torchrun(
    settings: TrainConfig, processes: int, board: _Board, at_restart: Callable[[], None] = lambda: None
) -> int:
    """Start a child that does what torchrun does, with processes that are forked; its process id."""
    arguments = minute.command(settings, Path(settings.out).parent)

    def process() -> int:
        rank, restarted = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
        board.begin(rank)
        train.plot = lambda *_: None
        train.Trainer._gradients = board.count(rank, "step", train.Trainer._gradients)
        due.validation = board.count(rank, "validation", due.validation)
        checkpoints.write = board.count(rank, "save", checkpoints.write)
        if restarted:
            at_restart()
            resume.point = _noting(resume.point)
        return cli.main(arguments)

    return minute.child(partial(torchrun, process, processes, 1), Path(settings.out).parent / "output.txt")


def _noting(point: Callable[..., Path | None]) -> Callable[..., Path | None]:
    """`point`, whose answer is noted beside the newest name that was there."""

    def noted(config: TrainConfig, say: Callable[[str], None]) -> Path | None:
        there = sorted(path.name for path in Path(config.out, "checkpoints").glob("step-*"))
        found = point(config, say)
        Path(config.out, "resumed.txt").write_text(f"{there[-1] if there else ''}\n{found.name if found else ''}")
        return found

    return noted


def _resumed(settings: TrainConfig) -> tuple[str | None, str | None]:
    """The newest checkpoint that a restarted run found, and the one that it went on from."""
    path = Path(settings.out, "resumed.txt")
    newest, taken = path.read_text().split("\n") if path.exists() else ("", "")
    return newest or None, taken or None


def _goes_on(
    settings: TrainConfig, processes: int, phase: str, draw: random.Random, reference: TrainConfig,
    at_restart: Callable[[], None] = lambda: None,
) -> tuple[float, str | None]:  # fmt: skip
    """Kill a process of a run; the seconds until the run has ended, and what was wrong with it."""
    while True:
        board, victim = _Board(processes), draw.randrange(processes)
        launched = _torchrun(settings, processes, board, at_restart)
        if _killed(launched, board, victim, phase, draw):
            break
        shutil.rmtree(settings.out)  # it was over
    begun = time.monotonic()
    code = minute.wait(launched, SECONDS)
    seconds = time.monotonic() - begun
    if code != 0:
        return seconds, f"it ended with {code}: {minute.said(Path(settings.out).parent)}"
    newest, taken = _resumed(settings)
    if newest != taken:
        return seconds, f"it went on from {taken}, and {newest} was there"
    try:
        for checkpoint in (path for path in Path(settings.out, "checkpoints").iterdir() if path.is_dir()):
            checkpoints.verify(checkpoint)
    except CheckpointError as error:
        return seconds, f"a torn folder: {error}"
    return seconds, None if minute.same(settings, reference) else _DIFFERS


def _killed(launched: int, board: _Board, victim: int, phase: str, draw: random.Random) -> bool:
    """Kill a process at a random instant of a phase; whether it was there."""
    nth = 1 if phase == "start" else draw.randint(1, PHASES[phase])
    deadline = time.monotonic() + minute.SECONDS

    def there() -> bool:
        return bool(board.pid(victim)) if phase == "start" else board.begun(victim, phase) >= nth

    while not there() and time.monotonic() < deadline:
        if os.waitpid(launched, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    time.sleep(draw.random() * (0.5 if phase == "start" else 0.02))
    try:
        os.kill(board.pid(victim), signal.SIGKILL)
    except ProcessLookupError:
        minute.wait(launched)
        return False
    return True
