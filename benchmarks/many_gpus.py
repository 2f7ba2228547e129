"""One GPU against many: speed, memory, and the loss of the same run. ``python benchmarks/many_gpus.py [--gpus 2]``

Prints the rows of benchmarks/train.py on one GPU and on all of them, each with the same batch a GPU, and how many times
as fast many are. Their ids are random, so that rows of tables are nearly all different. Then runs on the built-in
Python library: a v8 with its tables on the host and the same batch a GPU, for speed; and 200 steps with one global
batch, for the loss: the mean of the last 50 steps on one GPU and on many, and how far they are apart.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROWS = {"wide": "ddp", "large": "fsdp", "wide-v8-host": "ddp", "large-v8-host": "fsdp"}  # of benchmarks/train.py
STEPS, LAST, OF_TABLES = 200, 50, 60
RUN = (
    "train --data builtin:python-stdlib --tokenizer world --n_layer 12 --n_embd 768 --vocab_size 65536 "
    "--ctx_len 512 --warmup_steps 20 --save_every 0 --eval_every 0 --sample_every 0 --log_every 1"
)


def called(gpus: int, program: list[str]) -> str:
    """What a Python program prints, on that many GPUs."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    done = subprocess.run(
        [sys.executable, *launcher, *program], env=environment, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stdout)
    return done.stdout


def speed(printed: str, row: str) -> float:
    """Thousand tokens/s in a line that benchmarks/train.py printed."""
    found = re.search(rf"^{row} .*? ([\d.]+)k ", printed, re.MULTILINE)
    if found is None:
        sys.exit(f"no figure of {row} in\n{printed}")
    return float(found[1])


def logged(gpus: int, flags: str) -> list[dict[str, float]]:
    """The log of a run's steps."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        called(gpus, ["-m", "heron", *RUN.split(), *flags.split(), "--out", str(out)])
        records = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "loss" in record]


def speed_with_tables(gpus: int) -> float:
    """Thousand tokens/s of a v8 on text, its tables on the host: the median of the later half of the steps."""
    records = logged(gpus, f"--variant v8 --tables host --parallel ddp --micro_bsz 64 --max_steps {OF_TABLES}")
    return statistics.median(record["tokens_per_s"] for record in records[OF_TABLES // 2 :]) / 1e3


def last_losses(gpus: int, global_batch: int) -> list[float]:
    """The losses of the last steps of a run."""
    records = logged(gpus, f"--variant v7 --micro_bsz {global_batch // gpus} --max_steps {STEPS}")
    return [record["loss"] for record in records][-LAST:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument(
        "--global_batch", type=int, default=64, help="samples of a step in the comparison; 0: leave it out"
    )
    parser.add_argument("--no_text", action="store_true", help="leave out the v8 on text")
    options = parser.parse_args()
    for row in options.rows:
        program = [str(HERE / "train.py"), "--rows", row, "--parallel", ROWS[row]]
        one, many = (called(gpus, program) for gpus in (1, options.gpus))
        print(one, many, sep="", end="")
        print(f"{row}, {ROWS[row]}: {speed(many, row) / speed(one, row):.3f} times one GPU\n", flush=True)
    if not options.no_text:
        one, many = map(speed_with_tables, (1, options.gpus))
        print(f"v8 L12-D768 on text, tables on the host: {one:.1f}k tokens/s on one GPU, {many:.1f}k on "
              f"{options.gpus}; {many / one:.3f} times one GPU\n", flush=True)  # fmt: skip
    if options.global_batch:
        one, many = (statistics.mean(last_losses(gpus, options.global_batch)) for gpus in (1, options.gpus))
        print(f"loss, mean of the last {LAST} of {STEPS} steps: {one:.4f} on one GPU, {many:.4f} on {options.gpus}; "
              f"{abs(one - many):.4f} apart")  # fmt: skip


if __name__ == "__main__":
    main()
