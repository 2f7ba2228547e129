"""What a save costs beside writing its bytes. ``python benchmarks/checkpoint.py``

A save writes weights, moments and generators, hashes them, forces them onto the disk, renames the folder, and deletes
the save before. The yardstick writes the same bytes to as many new files, forces each onto the disk and deletes those
before, no more. Both in turns, in one folder. The hash is taken on a second core: use an idle machine. A shared disk is
several times slower in one turn than in the next, so the shortest times are compared.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import heron
from heron.checkpoint import run

PIECE = 1 << 24  # bytes a call: faster than all at once


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=512)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--folder", help="on the disk to be measured; default: the temporary folder")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = heron.RWKV(heron.ModelConfig(n_layer=args.n_layer, n_embd=args.n_embd, vocab_size=8192))
    optimizer = heron.build_optimizer(model)
    tokens = torch.zeros(1, 17, dtype=torch.int64)
    model.loss(tokens[:, 1:].contiguous(), tokens[:, :-1].contiguous()).backward()
    optimizer.step()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, saves, writes = Path(name), [], []
        saved = run.save(folder, 0, model, optimizer, {"step": 0}, "", keep=1)
        contents = [path.read_bytes() for path in saved.iterdir()]
        for turn in range(1, args.turns + 1):
            writes.append(_seconds(functools.partial(_write, contents, folder)))
            record = {"step": turn}
            saves.append(
                _seconds(lambda record=record: run.save(folder, record["step"], model, optimizer, record, "", 1))
            )
    size = sum(map(len, contents))
    print(f"{size / 1e6:.0f} MB in {len(contents)} files, {args.turns} turns; shortest (median)")
    for name, seconds in (("writing the bytes", writes), ("saving", saves)):
        print(f"{name:<18}  {min(seconds):7.2f} s  ({statistics.median(seconds):.2f} s)")
    print(f"saving / writing    {min(saves) / min(writes):7.2f}")


def _seconds(work: Callable[[], object]) -> float:
    os.sync()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _write(contents: list[bytes], folder: Path) -> None:
    before = list(folder.glob("plain-*"))
    for number, content in enumerate(contents):
        with open(folder / f"plain-{time.monotonic_ns()}-{number}", "wb") as file:
            for begin in range(0, len(content), PIECE):
                file.write(memoryview(content)[begin : begin + PIECE])
            file.flush()
            os.fsync(file.fileno())
    for path in before:
        path.unlink()


if __name__ == "__main__":
    main()
