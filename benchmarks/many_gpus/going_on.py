"""Save, kill one process, go on: on as many processes, on half of them, and on one."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.many_gpus.launch import Launcher
from heron import report
from heron.config import TrainConfig

_OF_STEP = ("step", "tokens", "loss", "grad_norm", "lr")


class Noted(NamedTuple):
    """What the witnesses of a run noted, in all its processes (:mod:`benchmarks.many_gpus.witness`)."""

    held: dict[int, set[str]]  # step -> digests of weights and moments: one, if all processes had the same
    read: dict[int, list[str]]  # first sample of a step -> digests of its samples, in any order

    @classmethod
    def of(cls, notes: Path, restart: int = 0) -> Noted:
        held, read = defaultdict(set), defaultdict(list)
        for path in notes.glob(f"{restart}-*.jsonl"):
            for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                if "holds" in record:
                    held[record["step"]].add(record["holds"])
                else:
                    read[record["first"]] += record["read"]
        return cls(dict(held), {first: sorted(samples) for first, samples in sorted(read.items())})


def measure(launcher: Launcher, folder: Path, config: TrainConfig, gpus: int) -> dict[str, Any]:
    """Make a run on all GPUs; kill a process of its twin, which torchrun starts anew; go on on fewer, too.

    Args:
        config: of a run on one process, which saves once in its middle and once at its end.

    Returns:
        `counts`: on how many processes a run went on; `loaded`: whether all of them began with the same weights and
        moments; `once`: whether each sample was read once by all of a run together; `curve`: whether the twin went on
        bit for bit; `apart`: how far the losses on fewer processes were from the first run's, at most.
    """

    def program(name: str, processes: int, *more: str, **changes: Any) -> list[str]:
        asked = dataclasses.replace(
            config, out=str(folder / name), micro_bsz=config.micro_bsz // processes,
            parallel="fsdp" if processes > 1 else "auto", **changes,
        )  # fmt: skip
        (folder / f"{name}.yaml").write_text(asked.to_yaml(), encoding="utf-8")
        return ["-m", "benchmarks.many_gpus.witness", f"{folder}/{name}.yaml", f"{folder}/{name}/notes", *more]

    middle = config.save_every
    launcher.run(program("whole", gpus), gpus)
    launcher.run(program("killed", gpus, "--dies_behind", str(middle)), gpus, restarts=1)
    saved = str(folder / "killed" / "checkpoints" / f"step-{middle:08d}")
    fewer = {f"on-{n}": n for n in sorted({gpus // 2, 1}, reverse=True)}
    launcher.side_by_side([(program(name, n, resume=saved), n) for name, n in fewer.items()])  # no more than all GPUs

    whole, before, again = (
        Noted.of(folder / name / "notes", n) for name, n in (("whole", 0), ("killed", 0), ("killed", 1))
    )
    others = [Noted.of(folder / name / "notes") for name in fewer]
    cursor = middle * config.samples_per_step
    first_half, second_half = (
        {first: read for first, read in whole.read.items() if (first >= cursor) == late} for late in (False, True)
    )
    read_before = {first: read for first, read in before.read.items() if first < cursor}
    loaded = [noted.held.get(middle, set()) for noted in (again, *others)]
    curve, twin, *curves = (_curve(folder / name) for name in ("whole", "killed", *fewer))
    return {
        "counts": [gpus, *fewer.values()],
        "loaded": len(loaded[0]) == 1 and all(held == loaded[0] for held in loaded),
        "once": list(whole.read) == list(range(0, config.max_steps * config.samples_per_step, config.samples_per_step))
        and read_before == first_half
        and all(noted.read == second_half for noted in (again, *others)),
        "curve": curve == twin and whole.held[config.max_steps] == again.held.get(config.max_steps),
        "apart": max(abs(a[2] - b[2]) for other in curves for a, b in zip(curve[middle:], other, strict=True)),
    }


def _curve(run: Path) -> list[tuple[float, ...]]:
    return [tuple(record[name] for name in _OF_STEP) for record in report.read_log(run)[0]]
