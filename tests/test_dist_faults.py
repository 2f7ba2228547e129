"""One of two processes fails alone: the other ends, too, long before its timeout, or both go on another way.

The processes are `python -m tests.test_dist_faults FOLDER TEXT`, which becomes two for each fault, some faults at once.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch._dynamo.exc import Unsupported

import heron
from heron import dist, machine, report
from heron.checkpoint import run
from heron.commands.telling import telling
from heron.errors import DataError
from heron.model import compiled
from heron.train import due, loop, run_data
from tests import warm
from tests.ranks import await_ends, begin, free_ports, of_preferences, settings, write_preferences

STEPS, SOON = 4, 50  # seconds; --dist_timeout is 60
AT_ONCE = 4  # pairs of processes
BEFORE = "before it is joined"
STARTS, PASSES, VALIDATION, SAVE = "while it starts", "in a step", "in a validation", "in a save"
FAULTS = [(fault, parallel) for fault in (STARTS, PASSES, VALIDATION) for parallel in ("ddp", "fsdp")] + [
    (SAVE, "fsdp")
]
LATE = "compiling late"


class FailingPass(heron.Trainer):
    """A trainer of which the second process fails in its third forward pass."""

    def _loop(self, parts, progress):
        if not self.ranks.is_first:
            parts.learner.network.loss = failing(parts.learner.network.loss, 3, RuntimeError("planted"))
        return super()._loop(parts, progress)


class FailingCompiler(heron.Trainer):
    """A trainer of which the compiler fails in the second process, in the n-th forward pass."""

    n = 1

    def _loop(self, parts, progress):
        network, name = parts.learner.network, "loss" if parts.learner.pairs is None else "hidden_states"
        if not self.ranks.is_first:
            setattr(network, name, failing(getattr(network, name), self.n, Unsupported("planted")))
        return super()._loop(parts, progress)


class LateCompiler(FailingCompiler):
    n = 3


def failing(function: Callable, n: int, error: Exception) -> Callable:
    """`function`, whose n-th call fails."""
    calls = itertools.count(1)

    def call(*given, **named):
        if next(calls) == n:
            raise error
        return function(*given, **named)

    return call


def plant(fault: str) -> type[heron.Trainer]:
    """Have the second process of a run meet a fault; the trainer that does."""
    if fault == PASSES:
        return FailingPass
    if fault.startswith("not compiling"):
        return heron.Trainer
    if "compiling" in fault:
        compiled.choose = lambda *_: machine.Choice("on", "as planted")
        dist.compile_blocks = lambda network: None
        return LateCompiler if fault == LATE else FailingCompiler
    if os.environ["RANK"] == "1":
        if fault == BEFORE:
            machine.choose_dtype = failing(machine.choose_dtype, 1, DataError("planted"))
        elif fault == STARTS:
            run_data.corpus = failing(run_data.corpus, 1, DataError("planted"))
        elif fault == VALIDATION:
            due.evaluate = failing(due.evaluate, 1, RuntimeError("planted"))
        else:
            run.Writer.files = failing(run.Writer.files, 1, RuntimeError("planted"))
    return heron.Trainer


def meet(folder: Path, text: Path, fault: str, parallel: str) -> None:
    """A run of one of two processes, the seconds that it took, and how it ended."""
    rank, begun, said = int(os.environ["RANK"]), time.monotonic(), []
    name = f"{parallel}-{fault}"
    changes = of_preferences(folder) if "pairs" in fault else {}
    config = settings(
        folder, text, name, max_steps=STEPS, eval_every=2, save_every=3, parallel=parallel, background_save="on",
        **changes,
    )  # fmt: skip
    try:
        with telling():
            trainer = plant(fault)(config, say=said.append)
        ended = trainer.fit()
    except Exception as error:
        ended = str(error)
    seconds = time.monotonic() - begun
    (folder / f"{name}-{rank}.txt").write_text(f"{seconds}\n{ended}")
    # as the end of the process would: it holds connections open until then
    os._exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What each of two processes left of each fault."""
    folder = tmp_path_factory.mktemp("faults")
    text = folder / "text.txt"
    text.write_text("".join(f"Number {n} is {n * n % 97}.\n" for n in range(100)))
    write_preferences(folder)
    warm.run(["-m", "tests.test_dist_faults", folder, text])
    return folder


def ends(folder: Path, name: str) -> list[str]:
    """How a run ended in each process; every one did soon."""
    found = [(folder / f"{name}-{rank}.txt").read_text().split("\n", 1) for rank in (0, 1)]
    assert max(float(seconds) for seconds, _ in found) < SOON
    return [ended for _, ended in found]


@pytest.mark.parametrize(("fault", "parallel"), FAULTS)
def test_a_process_that_fails_alone_takes_the_other_with_it(folder, fault, parallel):
    first, second = ends(folder, f"{parallel}-{fault}")
    assert "planted" in second
    assert first.startswith("rank 0: another process of the run failed")
    if fault == SAVE:
        checkpoints = folder / f"{parallel}-{fault}" / "checkpoints"
        assert not list(checkpoints.glob("step-*"))


def test_a_process_that_fails_before_it_is_joined_tells_the_other_why(folder):
    assert ends(folder, f"ddp-{BEFORE}") == ["rank 0: ends as rank 1 failed: planted", "planted"]


@pytest.mark.parametrize("what", ["", " pairs"])
def test_where_the_compiler_fails_in_one_process_all_go_on_without(folder, what):
    names = [f"ddp-compiling{what}", f"ddp-not compiling{what}"]
    assert [ends(folder, name) for name in names] == 2 * [["finished", "finished"]]
    ours, theirs = (report.read_log(folder / name)[0] for name in names)
    assert [record["loss"] for record in ours] == [record["loss"] for record in theirs]


@pytest.mark.parametrize("name", [f"ddp-{LATE}", "fsdp-compiling"])
def test_where_the_others_may_have_gone_on_a_compiler_that_fails_ends_the_run(folder, name):
    first, second = ends(folder, name)
    assert second.startswith("rank 1: compile auto: Unsupported: planted")
    assert second.endswith("use --compile off")
    assert first.startswith("rank 0: another process of the run failed")


if __name__ == "__main__":
    loop.plot = lambda folders, out: None
    of_compiler = [("not compiling", "ddp"), ("compiling", "ddp"), (LATE, "ddp"), ("compiling", "fsdp")]
    of_compiler += [("not compiling pairs", "ddp"), ("compiling pairs", "ddp")]
    faults = [(BEFORE, "ddp"), *FAULTS, *of_compiler]
    works = [partial(meet, Path(sys.argv[1]), Path(sys.argv[2]), *fault) for fault in faults]
    ports = free_ports(len(works))
    for first in range(0, len(works), AT_ONCE):  # they wait for each other, most of the time
        pairs = [begin(2, work, [port]) for work, port in list(zip(works, ports, strict=True))[first : first + AT_ONCE]]
        await_ends(list(itertools.chain(*pairs)))
