"""What ROSA memory gives, and where it does not help: models with and without it, on several texts, with several seeds.

``python -m benchmarks.study_memory prepare TEXTS``, then ``run TEXTS RESULTS`` as often as it takes, on any number of
machines, then ``report RESULTS ...``. docs/study_memory.md says what is asked and how it is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from benchmarks import command_line, jobs
from benchmarks.study_memory import report, runs, texts
from heron.commands import EXIT_FAILED, EXIT_PREEMPTED
from heron.errors import ConfigError, DataError

REPOSITORY = Path(__file__).parents[2]
LAMBADA = Path(os.environ.get("HERON_TEST_DATA", REPOSITORY.parent / "shared" / "data")) / "lambada_test.jsonl"
COLLECTED = ["/usr/share/doc", "/usr/share/man", "/usr/include", sysconfig.get_path("purelib")]
MARGIN = 1.15  # a run may take so much longer than the longest before it


def prepare(options: argparse.Namespace) -> int:
    prose = options.prose or (LAMBADA if LAMBADA.exists() else None)
    if prose is None:
        print(f"no prose: {LAMBADA} is not there; --prose names a text or jsonl")
    texts.prepare(options.texts, prose, options.collect, int(options.megabytes * 1e6), print)
    return 0


def run(options: argparse.Namespace) -> int:
    known = texts.prepared(options.texts)
    chosen = options.on or [name for name in known if name != runs.LARGE]
    if not chosen:
        raise DataError(f"{options.texts}: holds no text of the study; type: prepare {options.texts}")
    if missing := [name for name in chosen if name not in known]:
        raise DataError(f"{options.texts}: {', '.join(missing)} is not there; prepare makes it, or says why not")
    if unknown := [name for name in options.models or [] if name not in runs.MODELS]:
        raise ConfigError(f"models: {', '.join(unknown)} unknown; there are {', '.join(runs.MODELS)}")
    sizes = runs.Sizes(**{field.name: vars(options)[field.name] for field in dataclasses.fields(runs.Sizes)})
    wanted = runs.cases(chosen, options.models, options.seeds)
    waiting = [case for case in wanted if not (options.results / case.name).exists()]
    print(f"{len(wanted)} runs, {len(wanted) - len(waiting)} of them done before")

    def expected(job: jobs.Job) -> float:
        ended = (options.results / job.name.partition("/")[0]).glob("*/*/job.json")
        seconds = [json.loads(path.read_text(encoding="utf-8"))["process_seconds"] for path in ended]
        return MARGIN * max(seconds, default=options.expect)

    work = [_job(case, known[case.text], sizes, options.results) for case in waiting]
    failed = jobs.run(work, options.jobs, 60 * options.minutes, expected, lambda line: print(line, flush=True))
    if any((options.results / case.name).exists() for case in wanted):
        shutil.copyfile(options.texts / texts.DESCRIBED, options.results / texts.DESCRIBED)
        print(report.write([options.results], options.results))
    if failed:
        return EXIT_FAILED
    return 0 if all((options.results / case.name).exists() for case in wanted) else EXIT_PREEMPTED


def _job(case: runs.Case, text: texts.Text, sizes: runs.Sizes, results: Path) -> jobs.Job:
    """`heron train` of a case; its settings, its log and how long it took are kept."""
    config = runs.settings(case, text, sizes)

    def command(folder: Path) -> list[str]:
        (folder / "asked.yaml").write_text(config.to_yaml(), encoding="utf-8")
        return [sys.executable, "-m", "heron", "train", "--config", f"{folder}/asked.yaml", "--out", f"{folder}/run"]

    def keep(folder: Path, seconds: float) -> None:
        part = results / f".tmp-{case.name.replace('/', '-')}"
        part.mkdir(parents=True, exist_ok=True)
        for name in ("config.yaml", "log.jsonl"):
            shutil.copyfile(folder / "run" / name, part / name)
        (part / "job.json").write_text(json.dumps({"process_seconds": round(seconds, 1), "machine": _machine()}))
        (results / case.name).parent.mkdir(parents=True, exist_ok=True)
        part.rename(results / case.name)

    def is_done(folder: Path) -> bool:
        return runs.is_done(folder / "run" / "log.jsonl", config.total_steps)

    return jobs.Job(case.name, command, is_done, keep)


def _machine() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def _report(options: argparse.Namespace) -> int:
    print(report.write(options.results, options.out or options.results[0]))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study_memory", description=(__doc__ or "").partition("\n")[0]
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    made = actions.add_parser("prepare", help="make the texts ready, once on each machine")
    made.add_argument("texts", type=Path, help="folder for what is made of them, some hundred megabytes")
    made.add_argument("--prose", type=Path, help="a text or jsonl; default: lambada_test.jsonl in HERON_TEST_DATA")
    made.add_argument("--megabytes", type=float, default=52, help="of collected text; 0: none (default 52)")
    made.add_argument(
        "--collect", type=Path, nargs="+", default=[Path(folder) for folder in COLLECTED],
        help=f"folders to collect it from (default: {' '.join(COLLECTED)})",
    )  # fmt: skip
    made.set_defaults(action=prepare)

    ran = actions.add_parser("run", help="train what has not been trained yet, then report")
    ran.add_argument("texts", type=Path, help="folder that prepare wrote")
    ran.add_argument("results", type=Path, help="folder of results; what it holds is not run again")
    ran.add_argument("--on", nargs="+", choices=texts.VAL_FRACTION, help="default: all texts there but collected")
    ran.add_argument("--models", nargs="+", help=f"default: all; on collected {' '.join(runs.MODELS_OF_LARGE)}")
    ran.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    ran.add_argument("--jobs", type=int, default=1, help="runs side by side, over all GPUs (default 1)")
    ran.add_argument("--minutes", type=float, default=600, help="begin none that would not end by then (default 600)")
    ran.add_argument(
        "--expect", type=float, default=150, help="seconds of a run before one of its text has ended (150)"
    )
    ran.add_argument("--steps", type=int, default=400, help="of the small texts (default 400)")
    ran.add_argument("--steps_of_large", type=int, help="of the collected text; default: once over it")
    for name in ("n_layer", "n_embd", "ctx_len", "micro_bsz"):
        ran.add_argument(f"--{name}", type=int, help="default: as the study has it")
    ran.set_defaults(action=run)

    told = actions.add_parser("report", help="tables, a picture and results.jsonl of all runs in some folders")
    told.add_argument("results", type=Path, nargs="+", help="folders that run wrote")
    told.add_argument("--out", type=Path, help="folder for them; default: the first one")
    told.set_defaults(action=_report)

    options = parser.parse_args(arguments)
    return command_line.exit_code(parser, options)


if __name__ == "__main__":
    command_line.run(main)
