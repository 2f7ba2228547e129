"""One flipped bit anywhere in a checkpoint: it is never loaded, the one before it is, and one line says so.

The control compares sizes alone, as formats without a checksum do: the flipped weights are then loaded.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from heron.checkpoint import run as checkpoints
from heron.checkpoint.formats import safetensors
from tests.torture import minute
from tests.torture.result import Result


def run(trials: int, seed: int) -> Result:
    """Flip `trials` bits, one after another, each file as often as any other."""
    draw, failures = random.Random(seed), []
    with tempfile.TemporaryDirectory(prefix="heron-flips-") as name:
        folder = Path(name)
        trained = minute.trained(seed)
        older = trained.save(folder, 1)
        newest = trained.save(folder, 2)
        files = sorted(newest.iterdir())
        for trial in range(trials):
            file = files[trial % len(files)]
            bit = draw.randrange(8 * file.stat().st_size)
            _flip(file, bit)
            said: list[str] = []
            taken = checkpoints.newest(folder, said.append)
            if taken != older or len(said) != 1 or newest.name not in said[0]:
                failures.append(f"bit {bit} of {file.name}: {taken.name} was taken, and {said} said")
            _flip(file, bit)
        controls = max(2, trials // 20)
        weights = newest / checkpoints.MODEL
        header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
        good = safetensors.read(weights)
        caught = 0
        digests = {path: checkpoints.files.sha256(path) for path in (*newest.iterdir(), *older.iterdir())}
        with minute.replaced(checkpoints.files, "sha256", digests.__getitem__):
            for _ in range(controls):
                bit = draw.randrange(8 * header, 8 * weights.stat().st_size)
                _flip(weights, bit)
                bad = safetensors.read(checkpoints.newest(folder) / checkpoints.MODEL)
                caught += any((bad[name] != good[name]).any() for name in good)
                _flip(weights, bit)
    return Result(
        "one flipped bit in a checkpoint: never loaded silently",
        trials,
        2000,
        failures,
        "no sha256 compared: wrong weights are loaded",
        caught,
        controls,
    )


def _flip(file: Path, bit: int) -> None:
    with file.open("r+b") as content:
        content.seek(bit // 8)
        byte = content.read(1)[0]
        content.seek(bit // 8)
        content.write(bytes([byte ^ 1 << bit % 8]))
