"""What benchmarks have measured so far, a JSON object a line: ``--record`` of those that have it adds their figures.

``python benchmarks/history.py [WORD ...]`` prints the lines of history.jsonl that hold all the words, the newest last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HISTORY = Path(__file__).with_name("history.jsonl")
UNKNOWN, CHANGED = "unknown", "+"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a benchmark whose figures may be recorded."""
    parser.add_argument(
        "--record", type=Path, nargs="?", const=HISTORY, metavar="FILE",
        help="add the figures to this file (default: benchmarks/history.jsonl)",
    )  # fmt: skip
    parser.add_argument("--commit", default="", help="what was measured, where the folder is no checkout")


def record(options: argparse.Namespace, benchmark: str, row: str, figures: dict[str, float]) -> None:
    """Add a line, if the flags ask for it.

    Args:
        benchmark, row: which figures these are; the same names each time, so that lines compare.
        figures: by a name that ends with the unit.
    """
    if options.record is None:
        return
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    line = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": options.commit or commit(),
        "device": device,
        "torch": torch.__version__,
        "benchmark": benchmark,
        "row": row,
        **{name: float(f"{value:.5g}") for name, value in figures.items()},
    }
    with options.record.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def commit() -> str:
    """The commit of this checkout, with CHANGED behind it where files differ from it; UNKNOWN elsewhere."""
    try:
        command = ["git", "describe", "--always", f"--dirty={CHANGED}", "--abbrev=7", "--exclude=*"]
        return subprocess.run(command, cwd=HISTORY.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def found(lines: list[str], words: list[str]) -> list[str]:
    """The lines that hold all the words."""
    return [line for line in lines if all(word in line for word in words)]


if __name__ == "__main__":
    for line in found(HISTORY.read_text(encoding="utf-8").splitlines(), sys.argv[1:]):
        told = json.loads(line)
        where = [told.pop(name) for name in ("date", "commit", "device", "torch", "benchmark", "row")]
        print(" ".join(where), *(f"{name} {value:g}" for name, value in told.items()), sep="  ")
