"""A vocabulary is learned in a process of its own, so that a stop can end it: the library would not stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from heron import tokenizer
from heron.errors import ConfigError, HeronError

_SECONDS_UNTIL_A_LINE = 2.0
_SECONDS_BETWEEN_LINES = 15.0
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from heron.tokenizer import learned; learned._answer()"


def learn(texts: Sequence[str], vocab_size: int, say: Callable[[str], None]) -> str:
    """:func:`heron.tokenizer.learn_bpe`, with a line of progress where it takes longer than two seconds.

    Raises:
        ConfigError: as `learn_bpe`.
        HeronError: the process ended without an answer: it ran out of memory, or was killed.
    """
    command = [sys.executable, "-P", "-c", _PROGRAM, str(Path(__file__).parents[2])]
    with tempfile.TemporaryFile("w+", encoding="ascii") as asked:
        json.dump({"texts": list(texts), "vocab_size": vocab_size}, asked)
        asked.seek(0)
        begun, due = time.monotonic(), _SECONDS_UNTIL_A_LINE
        process = subprocess.Popen(command, stdin=asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while True:
            try:
                out, err = process.communicate(timeout=max(begun + due - time.monotonic(), 0.0))
                break
            except subprocess.TimeoutExpired:
                seconds, size = time.monotonic() - begun, sum(map(len, texts)) / 1e6
                say(f"learning {vocab_size:,} ids from {size:,.1f} M characters: {seconds:.0f} s so far")
                due = seconds + _SECONDS_BETWEEN_LINES
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    try:
        answer = json.loads(out)
    except ValueError:
        last = (err.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise HeronError(f"tokenizer bpe:{vocab_size}: it could not be learned: {last}. Try less text") from None
    if "refused" in answer:
        raise ConfigError(answer["refused"])
    return answer["learned"]


def _answer() -> None:
    """What that process does: a question from standard input, the answer to standard output."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):  # they reach a whole group; the asking process decides
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    asked = json.loads(sys.stdin.buffer.read())
    try:
        answer = {"learned": tokenizer.learn_bpe(asked["texts"], asked["vocab_size"])}
    except ConfigError as error:
        answer = {"refused": str(error)}
    sys.stdout.buffer.write(json.dumps(answer).encode())


def _leave_with(parent: int) -> None:
    """End this process when the one that asked is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
