"""One GPU against many: speed, memory, the loss of one run, and one that goes on after a process of it was killed.

``python -m benchmarks.many_gpus --gpus 8`` prints one table in Markdown, each row as it is measured, the most important
first, and ends within --minutes: what would not end by then is not begun. ``--out`` keeps what was measured, with
commit, device and version of PyTorch, and the same command goes on behind it. ``--tiny`` tries the command on CPUs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import command_line, history
from benchmarks.jobs import visible_devices
from benchmarks.many_gpus.launch import Launcher
from benchmarks.many_gpus.results import Results
from benchmarks.many_gpus.rows import Row, full, rows, tiny
from heron.commands import EXIT_FAILED, EXIT_PREEMPTED
from heron.errors import ConfigError

RESULTS = "results.jsonl"
TEXT = "".join(f"{n} times {n} is {n * n}.\n" for n in range(300))
ROWS = list(rows(2, full(), [0], 1.0))
HEAD = ("what", "one GPU", "{gpus} GPUs", "times one GPU", "share of linear", "GiB a GPU", "share of bf16 peak")
NOTE = """\
Tokens/s of all GPUs. Share of the bf16 peak: 6 x weights x tokens/s of {peak:.0f} TF/s a GPU. The weights are all but
embeddings and tables, of which a token looks up a row; WKV7, and what is computed twice, does not count. GiB: allocated
by PyTorch."""


def measure(options: argparse.Namespace) -> int:
    gpus, there = options.gpus, len(visible_devices())
    if gpus < 2:
        raise ConfigError(f"gpus: wanted at least 2, got {gpus}")
    if not options.tiny and there < gpus:
        raise ConfigError(f"gpus: wanted {gpus}, and there are {there}; --tiny tries the command on CPUs")
    launcher = Launcher(time.monotonic() + 60 * options.minutes)
    with tempfile.TemporaryDirectory(prefix="heron-many-") as folder:
        text = Path(folder, "text.txt")
        text.write_text(TEXT, encoding="utf-8")
        scale = tiny(text) if options.tiny else full()
        if scale.run.micro_bsz % gpus:
            raise ConfigError(f"gpus: wanted a number that divides {scale.run.micro_bsz} samples, got {gpus}")
        options.out.mkdir(parents=True, exist_ok=True)
        commit = options.commit or history.commit()
        device = "CPU, models too small to tell anything" if options.tiny else torch.cuda.get_device_name()
        results = Results(
            options.out / RESULTS, {"commit": commit, "device": device, "torch": torch.__version__},
            trusted=commit != history.UNKNOWN and not commit.endswith(history.CHANGED),
        )  # fmt: skip
        print(f"{gpus} x {device}, torch {torch.__version__}, commit {commit}\n")
        print(_line([cell.format(gpus=gpus) for cell in HEAD]))
        print("|---|" + "---:|" * (len(HEAD) - 1), flush=True)
        made = rows(gpus, scale, options.seeds, 1e12 * options.peak)
        whys = [why for name in options.rows for why in _row(made[name], results, launcher)]
    print(f"\n{NOTE.format(peak=options.peak)}")
    if any(why.startswith("failed") for why in whys):
        return EXIT_FAILED
    return EXIT_PREEMPTED if whys else 0


def _row(row: Row, results: Results, launcher: Launcher) -> list[str]:
    """Measure a row and print it; why parts of it have no figures."""
    found = [results.measured(part, launcher) for part in row.parts]
    print(_line([row.what, *row.cells(found)]), flush=True)
    return [why for why in found if isinstance(why, str)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.many_gpus", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--gpus", type=int, default=8, help="how many are compared with one (default 8)")
    parser.add_argument("--minutes", type=float, default=10, help="for all of it (default 10)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the runs whose losses are compared (0)")
    parser.add_argument("--peak", type=float, default=989, help="TF/s of a GPU in bf16 (default 989: H100, H200)")
    parser.add_argument("--out", type=Path, default=Path("runs/many_gpus"), help="folder of results.jsonl")
    parser.add_argument("--commit", help="of this code, where git can't tell")
    parser.add_argument("--tiny", action="store_true", help="models of some thousand parameters, on CPUs")
    parser.set_defaults(action=measure)
    return command_line.exit_code(parser, parser.parse_args(arguments))


if __name__ == "__main__":
    command_line.run(main)
