"""What a network learns with ROSA that it does not learn without. ``python benchmarks/rosa_learning.py [TASK ...]``

The tasks of examples/rosa_tasks.py, with ROSA and without at equal steps, per seed; what is left of the trained network
when ROSA puts out 0, prefers the earliest of equal matches, or hands on the value at the end of a match in place of the
one after it; and the loss of examples/rosa_counting.py. On two idle cores repeating takes minutes a seed, counting
fifteen.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rosa_checkpoints import ablated

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import rosa_counting
import rosa_tasks

STEPS = {"repeat": 200, "reverse": 400, "add": 400}
ABLATIONS = ("output 0", "ties to the earliest", "value index r")


def quietly(train: Any, *arguments: Any, **options: Any) -> tuple[Any, float]:
    """A trained model, and the seconds that it took."""
    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        return train(*arguments, **options), time.perf_counter() - begun


def task(name: str, seeds: int) -> None:
    steps = STEPS[name]
    print(f"\n{name}, {steps} steps: share of answer tokens that are right")
    print(f"{'seed':>4}{'with ROSA':>12}{'without':>10}" + "".join(f"{change:>22}" for change in ABLATIONS))
    for seed in range(seeds):
        with_rosa, seconds = quietly(rosa_tasks.train, name, "qkv-4bit", seed, steps)
        without, seconds_without = quietly(rosa_tasks.train, name, None, seed, steps)
        shares = [rosa_tasks.accuracy(model, name) for model in (with_rosa, without)]
        for change in ABLATIONS:
            changed = copy.deepcopy(with_rosa)
            with ablated(changed, change):
                shares.append(rosa_tasks.accuracy(changed, name))
        cells = "".join(f"{share:>{width}.1%}" for share, width in zip(shares, (12, 10, 22, 22, 22), strict=True))
        print(f"{seed:>4}{cells}   {seconds:.0f} s and {seconds_without:.0f} s", flush=True)


def counting(seeds: int) -> None:
    print("\ncounting, 1000 steps of 128: loss over 256 fresh sequences")
    for seed in range(seeds):
        model, seconds = quietly(rosa_counting.train, seed)
        with torch.no_grad():
            loss = rosa_counting.loss_of(model, random.Random("fresh"), 256)
        print(f"{seed:>4}{loss:>12.3f}   {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="task", help="repeat, reverse, add, counting; default: the first")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in args.tasks or ["repeat"]:
        counting(args.seeds) if name == "counting" else task(name, args.seeds)


if __name__ == "__main__":
    main()
