"""Try to break the promises of docs/reliability.md, and print the table. ``python -m tests.torture --help``"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import os
import re
import sys
import textwrap
import time
import warnings
from pathlib import Path

from tests.torture.result import Result

ALL = 1000  # more than there are
FULL = {
    "kills": 300,
    "kills_of_finetuning": 80,
    "syscalls": ALL,
    "disk_full": 100,
    "bit_flips": 2000,
    "fields": ALL,
    "nonfinite": 48,
    "signals": 100,
    "datasets": 20_000,
    "foreign": 2000,
    "jsonl": 200_000,
    "builds": 30,
    "serving": 10_000,
    "serving_schema": 5000,
    "processes": 9,
    "ranks": 60,
}
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
HEAD = ("| promise | trials | broken | control (must be found) | found | notes | seconds |", "|" + "---|" * 7)
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def trial(name: str, fraction: float, seed: int) -> Result:
    """Run one promise with that share of its full trials, at least one."""
    trials = max(1, math.ceil(FULL[name] * fraction))
    begun = time.monotonic()
    result = importlib.import_module(f"tests.torture.{name}").run(trials, seed)
    command = f"python -m tests.torture {name} --seed {seed}" + (f" --trials {fraction:g}" if fraction < 1 else "")
    return dataclasses.replace(result, command=command, seconds=time.monotonic() - begun)


def shown(result: Result) -> str:
    """A result for the console."""
    verdict = "holds" if result.holds else "BROKEN"
    lines = textwrap.wrap(f"{verdict}: {result.promise}", 80, subsequent_indent="    ")
    lines.append(f"    {result.trials} trials, {len(result.failures)} failed, {result.seconds:.0f} s  {result.notes}")
    control = f"control: {result.control}: {result.caught} of {result.control_trials} found"
    lines += textwrap.wrap(control, 80, initial_indent="    ", subsequent_indent="    ")
    lines += [f"    failed: {line}" for line in result.failures[:5]]
    return "\n".join(lines)


def row(result: Result) -> str:
    """A result as a row of the Markdown table."""
    cells = (
        f"{result.promise} (`{result.command}`)",
        f"{result.trials:,}",
        len(result.failures),
        result.control,
        f"{result.caught} of {result.control_trials}",
        result.notes,
        f"{result.seconds:.0f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def written(page: str, results: list[Result]) -> str:
    """The page with the rows of these results between its markers; rows of promises that were not run now are kept."""
    before, begin, rest = page.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{PAGE}: wanted the markers {BEGIN} and {END}")
    rows = {found[1]: found[0] for found in re.finditer(r"^\|.*`python -m tests\.torture (\w+).*$", old, re.MULTILINE)}
    rows |= {result.command.split()[3]: row(result) for result in results}
    lines = [*HEAD, *(rows[name] for name in FULL if name in rows)]
    return "\n".join([before + begin, "", *lines, "", end + after])


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; 0 if every promise holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description="Try to break the promises.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FULL)}; none: all of them")
    parser.add_argument("--trials", type=float, default=1.0, help="share of the full number of trials, such as 0.1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help=f"put the table into docs/{PAGE.name}")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - FULL.keys()
    if unknown:
        parser.error(f"no such promise: {', '.join(sorted(unknown))}; there are {', '.join(FULL)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    results = []
    for name in options.names or FULL:
        results.append(trial(name, options.trials, options.seed))
        print(shown(results[-1]), flush=True)
    if options.write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
