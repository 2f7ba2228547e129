"""Processes that work for another one: what they hear of a Ctrl-C, and that none outlives it."""

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and process groups are POSIX's")

CODE = """
import os, signal, time
from heron.data.workers import Workers

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
with Workers(1) as workers:
    try:
        print(workers.submit(os.getpid).result(), flush=True)  # the signal may come as soon as this is read
        time.sleep(60)
    except KeyboardInterrupt:
        print(workers.submit(os.getpid).result(), flush=True)
"""


@pytest.fixture
def started():
    """A process with one worker, in a group of their own, and the worker's number."""
    asked = [sys.executable, "-c", CODE]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0) as process:
        yield process, int(process.stdout.readline())


def test_a_ctrl_c_that_reaches_the_whole_group_is_for_the_first_alone(started):
    process, worker = started
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == (f"{worker}\n", "")
    assert process.returncode == 0


def test_no_worker_outlives_a_process_that_was_killed(started):
    process, _ = started
    process.kill()
    process.communicate(timeout=10)  # the worker has inherited the streams, which end with it
