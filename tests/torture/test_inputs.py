"""Short forms of the attacks on what Heron reads; `python -m tests.torture` runs the long ones."""

from pathlib import Path

import pytest

from tests.torture import datasets, foreign, jsonl

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="forks, and reads its memory in /proc")


@pytest.mark.parametrize(
    ("attack", "trials"), [(datasets, 150), (jsonl, 4000), (foreign, 52)], ids=["datasets", "jsonl", "foreign"]
)
def test_no_hostile_input_gets_through(attack, trials):
    result = attack.run(trials, seed=1)
    assert not result.failures, "\n".join(result.failures[:10])
    assert result.trials == trials
    assert result.holds, (result.control, result.caught, result.control_trials)
