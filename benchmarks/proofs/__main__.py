"""What RWKV-7 can compute and recall, shown by training it: state tracking, recall, reversal, parity, copying.

``python -m benchmarks.proofs S5`` or another name, or ``all``; then ``report``. docs/proofs.md says what is asked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import command_line, jobs
from benchmarks.proofs import report
from benchmarks.proofs.catalogue import PROOFS, TASKS, Case, cases
from benchmarks.proofs.models import MODELS
from benchmarks.proofs.training import learn
from benchmarks.timing import device_of
from heron.commands import EXIT_FAILED, EXIT_PREEMPTED

WORTH_BEGINNING = 45.0  # seconds: a process starts, compiles and trains a case in no less


def run(options: argparse.Namespace) -> int:
    """Train what is not there yet, in processes side by side, then report."""
    wanted = cases(PROOFS if options.proof == "all" else [options.proof], options.seeds)
    left = [case for case in wanted if not (options.out / case.name).exists()]
    print(f"{len(wanted)} runs, {len(wanted) - len(left)} of them done before", flush=True)
    work = [_job(group, options) for group in dict.fromkeys((case.task, case.model) for case in left)]
    failed = jobs.run(
        work, options.jobs, 60 * options.minutes, lambda job: WORTH_BEGINNING, lambda line: print(line, flush=True)
    )
    done = [case for case in wanted if (options.out / case.name).exists()]
    if done:
        print(report.write([options.out], options.out))
    if failed:
        return EXIT_FAILED
    return 0 if len(done) == len(wanted) else EXIT_PREEMPTED


def _job(group: tuple[str, str], options: argparse.Namespace) -> jobs.Job:
    """A process that trains a model on a task with each seed in turn: what the first has compiled serves all."""
    names = [Case(*group, seed) for seed in options.seeds]
    steps = [] if options.steps is None else ["--steps", str(options.steps)]

    def command(_: Path) -> Sequence[str]:
        return [
            sys.executable, "-m", "benchmarks.proofs", "train", *group, "--seeds", *map(str, options.seeds),
            "--out", str(options.out), "--device", options.device, *steps,
        ]  # fmt: skip

    def is_done(_: Path) -> bool:
        return all((options.out / case.name).exists() for case in names)

    return jobs.Job("/".join(group), command, is_done, lambda folder, seconds: None)


def train(options: argparse.Namespace) -> int:
    """Train a model on a task with each seed in this process."""
    for seed in options.seeds:
        case = Case(options.task, options.model, seed)
        if not (options.out / case.name).exists():
            print(learn(case, options.out, options.chosen_device, options.steps), flush=True)
    return 0


def _report(options: argparse.Namespace) -> int:
    print(report.write(options.results, options.out or options.results[0]))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proofs", description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(required=True, metavar="NAME")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, default=Path("runs/proofs"), help="folder of results (runs/proofs)")
    common.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    common.add_argument("--steps", type=int, help="of each run; default: as the proof has it")
    common.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")

    for name in ("all", *PROOFS):
        what = "every proof, the most important first" if name == "all" else f"the proof {name}"
        proof = actions.add_parser(name, parents=[common], help=f"{what}; what is there is not run again")
        proof.add_argument("--jobs", type=int, default=1, help="processes side by side, over all GPUs (default 1)")
        proof.add_argument("--minutes", type=float, default=600, help="end what has not ended by then (default 600)")
        proof.set_defaults(action=run, proof=name)

    one = actions.add_parser("train", parents=[common], help="one model on one task, in this process")
    one.add_argument("task", choices=TASKS)
    one.add_argument("model", choices=MODELS)
    one.set_defaults(action=train)

    told = actions.add_parser("report", help="the table, a picture and results.jsonl of all runs in some folders")
    told.add_argument("results", type=Path, nargs="+", help="folders of results")
    told.add_argument("--out", type=Path, help="folder for them; default: the first one")
    told.set_defaults(action=_report)

    options = parser.parse_args(arguments)
    if "device" in options:
        options.chosen_device = device_of(parser, options.device)
    return command_line.exit_code(parser, options)


if __name__ == "__main__":
    command_line.run(main)
