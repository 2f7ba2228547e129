"""A run that is begun by W1 processes and continued by W2 has the losses of one process, for all pairs of 1, 2, 4."""

from __future__ import annotations

import itertools
import random
import tempfile
from pathlib import Path

from heron import report
from heron.checkpoint import run as checkpoints
from tests.ranks import launch
from tests.torture.result import Result

BATCH, HALF, STEPS, CLOSE = 4, 4, 8, 1e-6
PAIRS = list(itertools.product((1, 2, 4), repeat=2))
TEXT = "".join(f"{n} times {n} is {n * n}.\n" for n in range(600))
RUN = (
    "-m heron train --variant v7 --n_layer 2 --n_embd 32 --head_size 16 --vocab_size 256 --ctx_len 32 --lr_init 3e-4 "
    "--lr_final 1e-4 --warmup_steps 2 --threads 1 --dtype fp32 --device cpu --sample_every 0 --eval_every 0 --keep 9 "
    f"--max_steps {STEPS} --save_every {HALF} --dist_timeout 60"
)


def run(trials: int, seed: int) -> Result:
    """Make `trials` pairs of runs, with ddp, fsdp or hsdp drawn for each part."""
    draw, failures = random.Random(seed), []
    with tempfile.TemporaryDirectory(prefix="heron-processes-") as name:
        folder = Path(name)
        (folder / "text.txt").write_text(TEXT, encoding="utf-8")
        reference = _losses(folder, "one", 1, "auto")
        pairs = PAIRS[:trials] if trials < len(PAIRS) else PAIRS
        farthest = 0.0
        for number, pair in enumerate(pairs):
            parallel = [draw.choice(("ddp", "fsdp", "hsdp")) for _ in pair]
            first = _losses(folder, f"first-{number}", pair[0], parallel[0])
            half = folder / f"first-{number}" / "checkpoints" / f"step-{HALF:08d}"
            second = _losses(folder, f"second-{number}", pair[1], parallel[1], "--resume", str(half))
            cursor = checkpoints.trainer_of(half)["cursor"]
            apart = _apart(first + second, reference + reference[HALF:])
            farthest = max(farthest, apart)
            if not (apart < CLOSE and cursor == HALF * BATCH and len(second) == STEPS - HALF):
                failures.append(f"{pair} with {parallel}: losses {apart:.1e} apart, next sample {cursor}")
        caught = _apart(_losses(folder, "larger", 2, "ddp", batch=2 * BATCH), reference) >= CLOSE
    notes = f"losses at most {farthest:.1e} apart"
    control = "another batch on two processes"
    return Result(
        "a run goes on on any number of processes", len(pairs), trials, failures, control, int(caught), 1, notes
    )


def _losses(folder: Path, name: str, processes: int, parallel: str, *more: str, batch: int = BATCH) -> list[float]:
    """The losses of a run of so many processes, of which each has its part of the batch."""
    out, size = folder / name, batch // processes
    named = ["--data", folder / "text.txt", "--out", out, "--micro_bsz", size, "--parallel", parallel, *more]
    started = launch([*RUN.split(), *map(str, named)], processes)
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)
    return [record["loss"] for record in report.read_log(out)[0]]


def _apart(ours: list[float], theirs: list[float]) -> float:
    if len(ours) != len(theirs):
        return float("inf")
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
