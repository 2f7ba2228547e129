"""A build that is killed never blocks the next one, and processes that start together compile once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

from torch.utils.file_baton import FileBaton

from heron.ops import _build
from tests.torture.result import Result

TIMEOUT_S = 60
HANG_S = 1
SOURCE = """
#include <algorithm>
#include <map>
#include <string>
extern "C" int answer(int x) {{
    std::map<int, std::string> seen{{{{x, "{salt}"}}}};
    return std::min(x, 41) + static_cast<int>(seen.size());
}}
"""


def load_and_ask(source: Path) -> None:
    """Build the library in this process and use it."""
    answer = _build.load_c_library("answer", [source]).answer(100)
    assert answer == 42, answer


def started(work: Callable[[], None], cache: Path) -> int:
    """The process id of a child that does `work` with its own cache folder and leaves with 0 if all went well."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ["HERON_CACHE"] = str(cache)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        code = 0
    finally:
        os._exit(code)


def ended(child: int, timeout_s: float) -> int | None:
    """The exit code of `child`, negative for a signal; None if it had to be killed after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def killed_then_loaded(
    source: Path, cache: Path, wait: Callable[[], object], timeout_s: float
) -> tuple[bool, int | None]:
    """Whether a kill behind `wait` came before the end of the first build, and how a second process fared then."""
    first = started(lambda: load_and_ask(source), cache)
    wait()
    os.kill(first, signal.SIGKILL)
    effective = ended(first, TIMEOUT_S) == -signal.SIGKILL
    return effective, ended(started(lambda: load_and_ask(source), cache), timeout_s)


def count_compiles(folder: Path, starts: int, source: Path) -> tuple[int, list[int | None]]:
    """How often the compiler ran when `starts` processes began at once with a cold cache, and their exit codes."""
    log = folder / "compiles"
    wrapper = folder / "bin" / "c++"
    wrapper.parent.mkdir()
    real = _build.find_compiler()
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) ;; *) echo run >> {log} ;; esac\nexec {real} "$@"\n', encoding="utf-8"
    )
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    with mock.patch.dict(os.environ, PATH=f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"):
        children = [started(lambda: load_and_ask(source), folder / "cache") for _ in range(starts)]
    codes = [ended(child, TIMEOUT_S) for child in children]
    return log.read_text(encoding="utf-8").count("run"), codes


def until_locked(cache: Path) -> None:
    """Wait until a build holds :func:`baton_lock`."""
    end = time.monotonic() + TIMEOUT_S
    while not list(cache.glob("*.baton")) and time.monotonic() < end:
        time.sleep(0.001)


@contextlib.contextmanager
def baton_lock(path: Path, name: str) -> Iterator[None]:
    """The lock that torch.utils.cpp_extension uses: a file that exists, which a killed holder leaves behind."""
    baton = FileBaton(f"{path}.baton")
    while not baton.try_acquire():
        baton.wait()
    yield
    baton.release()


def run(trials: int, seed: int) -> Result:
    """`trials` kills while a library is built, each followed by a load in another process; then 8 cold starts."""
    rng = random.Random(seed)
    failures: list[str] = []
    effective = attempts = caught = 0
    controls = max(1, trials // 10)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "answer.cpp"

        def fresh(what: str) -> Path:
            source.write_text(SOURCE.format(salt=f"{seed} {what}"), encoding="utf-8")
            return Path(scratch) / what.replace(" ", "-")

        begin = time.monotonic()
        cache = fresh("warm up")
        assert ended(started(lambda: load_and_ask(source), cache), TIMEOUT_S) == 0
        build_s = time.monotonic() - begin
        while effective < trials and attempts < 5 * trials:
            attempts += 1
            cache = fresh(f"kill {attempts}")
            was_effective, code = killed_then_loaded(
                source, cache, partial(time.sleep, rng.uniform(0, build_s)), TIMEOUT_S
            )
            effective += was_effective
            if code != 0:
                failures.append(f"kill {attempts}: the next load ended with {'a hang' if code is None else code}")
        folder = fresh("cold start")
        folder.mkdir()
        compiles, codes = count_compiles(folder, 8, source)
        if compiles != 1 or codes != [0] * 8:
            failures.append(f"8 cold starts: {compiles} compiles, exit codes {codes}")
        with mock.patch.object(_build, "_file_lock", baton_lock):
            tried = 0
            for attempt in range(5 * controls):
                if tried == controls:
                    break
                cache = fresh(f"control {attempt}")
                wait = partial(until_locked, cache)
                was_effective, code = killed_then_loaded(source, cache, wait, HANG_S + 3 * build_s)
                tried += was_effective
                caught += was_effective and code is None
    return Result(
        promise="a killed build never blocks the next; 8 cold starts compile once",
        trials=effective,
        asked=30,
        failures=failures,
        control="the lock of torch.utils.cpp_extension: the next load hangs",
        caught=caught,
        control_trials=tried,
        notes=f"8 starts: {compiles} compile",
    )
