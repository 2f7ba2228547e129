"""Two GPUs: passes that are replayed, with all that travels, are those that are launched kernel by kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpus import MODEL, STEPS, TOGETHER

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    file = tmp_path_factory.mktemp("gpus") / "losses.json"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.gpus", str(file)]
    started = subprocess.run(
        [sys.executable, "-m", *launcher], cwd=Path(__file__).parents[1], timeout=240, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert started.returncode == 0, started.stdout
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", TOGETHER)
def test_replayed_passes_are_those_that_are_not(losses, name):
    launched, replayed = losses[f"{name}-on"], losses[f"{name}-graph"]
    assert len(launched) == len(replayed) == STEPS
    assert replayed == pytest.approx(launched, rel=2e-5)


@pytest.mark.parametrize(("one", "other"), [("ddp", "fsdp"), ("spans", "spans-fsdp"), ("tables", "tables-host")])
def test_weights_learn_the_same_wherever_they_lie(losses, one, other):
    for compiled in ("on", "graph"):
        assert losses[f"{other}-{compiled}"] == pytest.approx(losses[f"{one}-{compiled}"], rel=2e-5)


def test_copy_engines_gather_all_blocks_but_the_last_twice_a_pass(losses):
    if torch.cuda.nccl.version() < (2, 28) or not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("needs NCCL 2.28, and GPUs that reach each other's memory")
    assert losses["copies"] >= 2 * (MODEL.n_layer - 1)
