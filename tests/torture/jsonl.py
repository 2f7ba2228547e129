"""Hostile jsonl: every good line is read, every bad one is refused with its place, and nothing takes much memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from heron.data import corpora, jsonl
from heron.errors import DataError
from tests.torture.result import Result

LINES_PER_FILE = 2000
MEMORY_MB = 300

Hostile = Callable[[random.Random], bytes]


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


HOSTILE: dict[str, Hostile] = {
    "not UTF-8": lambda rng: b'{"text": "a' + bytes([rng.choice((0x80, 0xC0, 0xF5, 0xFF))]) + b'"}',
    "half a character": lambda rng: '{"text": "🦩'.encode()[: -rng.randint(1, 3)] + b'"}',
    "overlong form": lambda rng: b'{"text": "\xc0\xaf"}',
    "surrogate in UTF-8": lambda rng: b'{"text": "\xed\xa0\x80"}',
    "escaped half pair": lambda rng: b'{"text": "\\ud8%02x"}' % rng.randrange(256),
    "two byte order marks": lambda rng: b'\xef\xbb\xbf\xef\xbb\xbf{"text": "a"}',
    "UTF-16": lambda rng: '{"text": "a"}'.encode("utf-16").replace(b"\n", b""),
    "NUL": lambda rng: b"\0",
    "bare control character": lambda rng: b'{"text": "a' + bytes([rng.randrange(1, 9)]) + b'"}',
    "deep list": lambda rng: b'{"x": ' + b"[" * rng.randint(65, 5000) + b"]" * 3 + b', "text": "a"}',
    "deep and closed": lambda rng: b'{"x": %s, "text": "a"}' % nested(rng.randint(501, 900)),
    "deep object": lambda rng: b'{"x": ' * rng.randint(100, 3000) + b"1",
    "not a number": lambda rng: b'{"text": %s}' % rng.choice((b"NaN", b"Infinity", b"-Infinity")),
    "key twice": lambda rng: b'{"text": "a", "text": "b"}',
    "cut": lambda rng: b'{"text": "some text here"}'[: rng.randint(1, 25)],
    "two objects": lambda rng: b'{"text": "a"}{"text": "b"}',
    "carriage return between": lambda rng: b'{"text": "a"}\r{"text": "b"}',
    "list": lambda rng: b'["text"]',
    "string": lambda rng: b'"text"',
    "no text": lambda rng: b'{"txt": "a"}',
    "text of another kind": lambda rng: b'{"text": %s}' % rng.choice((b"1", b"null", b"true", b'["a"]', b'{"a": 1}')),
    "plain": lambda rng: b"plain words",
    "escape cut": lambda rng: b'{"text": "\\u12"}',
    "unknown escape": lambda rng: b'{"text": "\\x41"}',
    "single quotes": lambda rng: b"{'text': 'a'}",
    "trailing comma": lambda rng: b'{"text": "a",}',
    "comment": lambda rng: b'{"text": "a"} // b',
    "random bytes": lambda rng: b"\xff" + rng.randbytes(rng.randint(1, 60)).replace(b"\n", b""),
    "too long": lambda rng: b'{"text": "' + b"a" * (jsonl.LONGEST_LINE + rng.randint(0, 9)) + b'"}',
}
CURIOUS: dict[str, Hostile] = {  # in fields that are not used, where nothing depends on what a reader makes of them
    "not a number": lambda rng: b'{"text": "a", "n": %s}' % rng.choice((b"NaN", b"Infinity", b"-Infinity")),
    "infinite number": lambda rng: b'{"text": "a", "n": 1e%d}' % rng.randint(309, 99999),
    "long integer": lambda rng: b'{"text": "a", "n": ' + b"9" * rng.randint(4301, 9000) + b"}",
    "key twice": lambda rng: b'{"x": 1, "text": "a", "x": {"y": 1, "y": 2}}',
    "half pair": lambda rng: b'{"text": "a", "x": "\\ud8%02x"}' % rng.randrange(256),
    "deep": lambda rng: b'{"x": %s, "text": "a"}' % nested(rng.randint(65, 499)),
}
PIECES = ("a", " ", "\u2028", "\u0085", "\x7f", "\\n", "é", "世界", "🦩", '\\"', "[[{{", "\\ud83e\\udda9", "\\u0000")


def good_line(rng: random.Random) -> bytes:
    """An object with a text in which only a newline byte would end a line."""
    text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 12)))
    extra = rng.choice(("", ', "n": 1.5e3', ', "meta": {"tags": [[1], [2]], "x": null}'))
    return f'{{"text": "{text}"{extra}}}'.encode() + rng.choice((b"", b"", b"\r", b"  "))


def hostile_file(path: Path, rng: random.Random, lines: int) -> tuple[list[str], dict[int, tuple[str, int]]]:
    """Write a file; the texts of its good lines, and what is wrong with each bad line and where that begins."""
    texts, bad = [], {}
    with path.open("wb") as file:
        for number in range(1, lines + 1):
            if rng.random() < 0.5:
                name = rng.choice(list(HOSTILE))
                bad[number] = name, file.tell()
                line = HOSTILE[name](rng)
            elif rng.random() < 0.05:
                line = rng.choice((b"", b" ", b"\r"))
            elif rng.random() < 0.1:
                line = CURIOUS[rng.choice(list(CURIOUS))](rng)
                texts.append("a")
            else:
                line = good_line(rng)
                texts.append(json.loads(line)["text"])
            file.write(line if number == lines and rng.random() < 0.5 else line + b"\n")
    return texts, bad


def careless_reader(path: Path) -> list[str]:
    """What a short script does; fails on, or loses lines of, the same files."""
    texts = []
    for line in path.read_bytes().decode("utf-8", errors="replace").splitlines():
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return texts


def checked(path: Path, texts: list[str], bad: dict[int, tuple[str, int]]) -> list[str]:
    """Every way in which reading a file breaks the promise."""
    refusals: list[DataError] = []
    try:
        got = [text for _, text in corpora.read_documents(str(path), refusals.append)]
    except Exception as error:  # the promise is that none gets through
        return [f"{path.name}: {type(error).__name__}: {str(error)[:200]}"]
    failures = [] if got == texts else [f"{path.name}: {len(texts)} good lines, {len(got)} read, not the same"]
    wanted = [(f"{path}, line {number}: ", f"begins at byte {begin:,})") for number, (_, begin) in bad.items()]
    found = [str(refusal) for refusal in refusals]
    if len(found) != len(wanted):
        failures.append(f"{path.name}: {len(wanted)} bad lines, {len(found)} refused")
    for (where, offset), message in zip(wanted, found, strict=False):
        if not message.startswith(where) or not message.endswith(offset):
            failures.append(f"{path.name}: wanted {where}...{offset}, got {message[:200]}")
    return failures


_GIANT = """
import re, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from heron.data import corpora
path = Path(sys.argv[1])
refusals = []
texts = [text for _, text in corpora.read_documents(str(path), refusals.append)]
if sys.argv[2] == "whole":
    texts += path.read_text().splitlines()
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024  # not its parent's
print(peak, texts[:2] == ["before", "after"], [f"{path}, line 2: " in str(refusal) for refusal in refusals] == [True])
"""


def giant_line(folder: Path, size: int, reader: str) -> tuple[int, bool]:
    """Peak memory in MB of a process that reads a file with one line of `size` bytes, and whether it read it right."""
    path = folder / "giant.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(size >> 20):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n{"text": "after"}\n')
    command = [sys.executable, "-c", _GIANT, str(path), reader, str(Path(corpora.__file__).parents[2])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    path.unlink()
    peak, good, refused = done.stdout.split()
    return int(peak), (good, refused) == ("True", "True")


def run(trials: int, seed: int) -> Result:
    """`trials` lines, half of them hostile, then one line of 1 GB (of 150 MB when there are few trials)."""
    rng = random.Random(seed)
    failures: list[str] = []
    caught = control_trials = lines = n_bad = 0
    longest, jsonl.LONGEST_LINE = jsonl.LONGEST_LINE, 10_000  # so that lines beyond it take no gigabytes here
    try:
        with tempfile.TemporaryDirectory() as scratch:
            while lines < trials:
                path = Path(scratch) / f"{lines}.jsonl"
                count = min(LINES_PER_FILE, trials - lines)
                texts, bad = hostile_file(path, rng, count)
                failures += checked(path, texts, bad)
                control_trials += 1
                caught += careless_reader(path) != texts
                lines, n_bad = lines + count, n_bad + len(bad)
                path.unlink()
    finally:
        jsonl.LONGEST_LINE = longest
    size = 1 << 30 if trials >= 100_000 else 150 << 20
    with tempfile.TemporaryDirectory() as scratch:
        peak, right = giant_line(Path(scratch), size, "heron")
    if not right or peak >= MEMORY_MB:
        failures.append(f"a line of {size >> 20} MiB: peak {peak} MB, {'right' if right else 'wrong'}")
    return Result(
        promise="hostile jsonl: every good line read, every bad one named with line and byte, little memory",
        trials=lines,
        asked=200_000,
        failures=failures,
        control="splitlines and json.loads: lines are lost or invented in every file",
        caught=caught,
        control_trials=control_trials,
        notes=f"{n_bad:,} bad lines; a line of {size >> 20} MiB: peak {peak} MB",
    )
