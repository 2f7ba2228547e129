"""The short form of the promises about a run: few trials each, with a control. `make torture` runs all in full."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util

import pytest

from heron.ops import _build
from tests.torture import __main__ as torture
from tests.torture.result import Result

SHORT = {
    "kills": 2,
    "syscalls": 14,
    "disk_full": 10,
    "bit_flips": 60,
    "fields": 24,
    "nonfinite": 6,
    "signals": 7,
}
NEEDS_COMPILER = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
ALSO = [
    pytest.param("ranks", marks=pytest.mark.long),  # tests/test_dist.py and test_dist_faults.py kill processes, too
    pytest.param("builds", marks=NEEDS_COMPILER),
]
POSIX = pytest.mark.skipif(importlib.util.find_spec("fcntl") is None, reason="forks, signals and rlimits are POSIX's")


@POSIX
@pytest.mark.parametrize("name", [*SHORT, *ALSO])
def test_a_promise_holds_and_its_attack_can_fail(name):
    trials = SHORT.get(name, 1)
    result = importlib.import_module(f"tests.torture.{name}").run(trials, seed=0)
    assert result.failures == []
    assert result.caught == result.control_trials > 0
    assert result.trials == trials
    assert result.holds


RESULT = Result("it holds", 3, 3, [], "broken on purpose", 2, 2, "note", "python -m tests.torture fields --seed 0", 1.0)


@pytest.mark.parametrize("changes", [dict(failures=["one"]), dict(caught=1), dict(trials=0), dict(control_trials=0)])
def test_a_promise_is_broken_by_a_failure_a_blind_control_or_no_trial(changes):
    assert RESULT.holds
    assert not dataclasses.replace(RESULT, **changes).holds


def test_the_table_goes_between_the_markers_and_keeps_the_rows_of_other_promises():
    page = f"# Title\n{torture.BEGIN}\nstale\n{torture.END}\nthe rest\n"
    new = torture.written(page, [RESULT])
    assert new.startswith("# Title\n")
    assert new.endswith("the rest\n")
    assert "stale" not in new
    first = "| it holds (`python -m tests.torture fields --seed 0`) | 3 | 0 | broken on purpose | 2 of 2 | note | 1 |"
    assert first in new
    assert torture.written(new, [RESULT]) == new
    other = dataclasses.replace(RESULT, trials=5, command="python -m tests.torture kills --seed 4")
    both = torture.written(new, [other])
    assert both.index("tests.torture kills --seed 4") < both.index(first)  # in the order of the promises
    with pytest.raises(SystemExit, match="markers"):
        torture.written("no markers", [RESULT])
