"""What several tests share: one thread, `core` on the path, and models in which no weight is at a neutral value.

The process that deals tests to workers reads this file too. It needs no PyTorch, which takes seconds to import.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from heron import progress
from heron.commands import flags

if TYPE_CHECKING:
    from torch import Tensor, nn

    import heron

sys.path.insert(0, str(Path(__file__).parents[1]))  # `core/` and `tests` are not part of the installed package

from tests import warm

_LONG = ("test_dist.py", "test_dist_faults.py", "test_many_gpus.py", "test_torture.py")  # a test takes half a minute


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors: a fifth of a worker's time it waits for processes, a browser or a clock."""
    return (os.cpu_count() or 1) + 1


def pytest_xdist_setupnodes(specs):
    """Workers are forked by one process that has imported what tests import, where a fork is safe."""
    if sys.platform == "linux":
        os.environ[warm.ADDRESS] = warm.start_server()
        for spec in specs:
            spec.python = warm.worker()


def pytest_configure():
    """Look for cycles of objects seldom: among all that is imported a look takes a second."""
    gc.set_threshold(20_000, 20, 10)


class _FromItsShare(pytest.Dir):
    """A folder of tests, which each worker begins to read elsewhere, and finds compiled what others have read."""

    def collect(self):
        found, worker = [*super().collect()], self.config.workerinput
        first = len(found) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
        return found[first:] + found[:first]


def pytest_collect_directory(path, parent):
    """Unless it is a package, of which pytest knows more."""
    if not hasattr(parent.config, "workerinput") or (path / "__init__.py").exists():
        return None
    return _FromItsShare.from_parent(parent, path=path)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Every worker must have the tests in one order, and short ones at the end: the last worker is soon done then."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (item.path.name not in _LONG, item.path))


def pytest_collection_finish():
    gc.freeze()  # what is there now stays to the end


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small tensors are faster on one thread, and bit-exact comparisons need one number of threads throughout."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _silent_progress():
    """What is said of work that lasts depends on the machine; tests/test_progress.py sets how long that is."""
    before, progress.PATIENCE_S = progress.PATIENCE_S, 1e6
    yield
    progress.PATIENCE_S = before


@pytest.fixture(scope="session", autouse=True)
def _flags_are_listed_once():
    """A command makes its parser once; tests run a thousand commands in a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "parser", functools.cache(flags.parser))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_pictures_of_runs():
    """A picture of a run takes many times as long as such runs; `picture` has it drawn."""
    from heron.train import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot", lambda folders, out: None)
        yield


@pytest.fixture
def picture(monkeypatch):
    """Has `loss.png` drawn."""
    from heron import report
    from heron.train import loop

    monkeypatch.setattr(loop, "plot", report.plot)


@pytest.fixture(scope="session", autouse=True)
def _disk_is_not_awaited():
    """A kill loses nothing that only a power cut would, and no test cuts the power; runs wait for the disk often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def randomize() -> Callable[..., nn.Module]:
    """A function that gives every parameter of a model a random value under which its whole equation matters."""
    from tests import random_models

    return random_models.randomize


@pytest.fixture(scope="session")
def random_model() -> Callable[..., heron.RWKV]:
    """A function: ModelConfig fields (and `seed`) -> a small fp32 RWKV with random weights and odd sizes."""
    from tests import random_models

    return random_models.random_model


_PACKAGE_SCRIPT = """
import sys

import torch

torch.set_num_threads(1)
from rwkv.model import RWKV

answers = []
for path, tokens, pieces, *state in torch.load(sys.argv[1]):
    model, state, logits = RWKV(path, "cpu fp32"), state[0] if state else None, []
    for piece in torch.tensor(tokens).split(pieces):
        out, state = model.forward(piece.tolist(), state, full_output=True)
        logits.append(out.reshape(len(piece), -1))
    answers.append((torch.cat(logits), state))
torch.save(answers, sys.argv[2])
"""


@pytest.fixture
def rwkv_package(tmp_path) -> Callable[..., list[tuple[Tensor, list[Tensor]]]]:
    """A function that runs jobs in the `rwkv` package.

    A job is a path without .pth, token ids, the lengths of the pieces, and perhaps the state list to start from.

    It gives (logits (T, V), state list) of each. In a process of its own, since the package reads its environment once.
    """

    def run(
        jobs: list[tuple[Any, ...]], jit: bool = False, deep_embed: bool = False
    ) -> list[tuple[Tensor, list[Tensor]]]:
        import torch

        asked, answered = tmp_path / "jobs.pt", tmp_path / "answers.pt"
        torch.save([(str(path), *rest) for path, *rest in jobs], asked)
        environment = {**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": str(int(jit)), "RWKV_CUDA_ON": "0"}
        if deep_embed:
            environment["RWKV_DE_VERSION"] = "1"
        warm.run(["-c", _PACKAGE_SCRIPT, asked, answered], env=environment)
        return torch.load(answered)

    return run
