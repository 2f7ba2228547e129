"""Where the time of a step on many GPUs goes, kernel by kernel, beside a step of each GPU alone.

``torchrun --nproc-per-node 2 -m benchmarks.many_gpus.differences [--rows wide large 131k]``: for each row all GPUs at a
time make steps of their own, with nothing said between them, then steps together, and so on in turns, since a GPU that
has become warm is slower. A step of all takes as long as the slowest GPU does, so `times one GPU` is of the slowest
alone; `of the mean` is of all of them.

Then what the first GPU did in a step: `busy` with kernels that compute, `exposed` with NCCL's alone, `idle`; and the
kernels of which it took most more, or less, than alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.many_gpus.rows import LARGE, LONG, ONE_TEXT, WIDE, Settings
from heron.commands.bench import fresh_learner, random_batch
from heron.config import ModelConfig, TrainConfig
from heron.dist import ALONE, Ranks
from heron.train.loop import Trainer
from heron.train.step import Learner

WARM_UP, TURNS, PROFILED = 4, 3, 3  # in three steps all is compiled, the fourth may be recorded
ANNOTATIONS = ("FSDP::", "nccl:", "Optimizer.", "ProfilerStep")  # what a profile lists beside kernels


class Row(NamedTuple):
    """A step, and how many GPUs share it."""

    settings: Settings
    of_many: Settings
    is_shared: bool  # the samples of one GPU alone; else each has as many


def rows(gpus: int) -> dict[str, Row]:
    """All of them by name."""
    return {
        "wide": Row(WIDE, dict(parallel="ddp"), False),
        "large": Row(LARGE, dict(parallel="fsdp"), False),
        "131k": Row(dict(ONE_TEXT, ctx_len=LONG), dict(context_parallel=gpus, parallel="ddp"), True),
    }


def config_of(row: Row, **changes: object) -> TrainConfig:
    """The run of all processes."""
    settings = {"variant": "v7", **row.settings, **row.of_many, **changes}
    sizes = {name: settings.pop(name) for name in ("variant", "n_layer", "n_embd")}
    model = ModelConfig(vocab_size=65536, **sizes)
    return Trainer(TrainConfig(model=model, max_steps=1, dtype="bf16", device="cuda", **settings)).config


def alone(config: TrainConfig) -> TrainConfig:
    """The run that each process makes by itself."""
    return dataclasses.replace(config, parallel="auto", context_parallel=1, processes=0)


class Kernels(NamedTuple):
    """What a GPU did in a step, milliseconds."""

    by_name: Counter[str]
    counts: Counter[str]
    busy: float
    exposed: float
    idle: float


class Steps:
    """Steps with a fresh model.

    Args:
        ranks: who share them.
        together: who begin at the same time.

    Attributes:
        seconds: of a step, the mean of each call of :meth:`make`.
        loss: of the last step.
        peak_bytes: what they took at most, at first.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, together: Ranks):
        assert isinstance(config.model, ModelConfig)
        before = torch.cuda.memory_allocated()
        torch.manual_seed(config.seed)
        self.learner: Learner = fresh_learner(config, config.model, ranks)
        torch.manual_seed(config.seed + ranks.group(config.context_parallel)[0])
        self._batches = [random_batch(config, config.model) for _ in range(4)]
        self._together, self._made = together, 0
        self.seconds: list[float] = []
        torch.cuda.reset_peak_memory_stats()
        self.warm_up()
        self.peak_bytes = torch.cuda.max_memory_allocated() - before

    def warm_up(self) -> None:
        """Make steps that do not count."""
        self.make(WARM_UP)
        self.seconds.clear()

    def make(self, steps: int) -> None:
        """Make so many; the host does not wait between them."""
        torch.cuda.synchronize()
        self._together.all(True)
        begun, numbers = time.perf_counter(), torch.full((1,), math.nan)
        for _ in range(steps):
            samples = self._batches[self._made % len(self._batches)]
            numbers = self.learner.update(self.learner.gradients(samples), self.learner.config.lr_init, math.inf)
            self._made += 1
        torch.cuda.synchronize()
        self.seconds.append((time.perf_counter() - begun) / steps)
        self.loss = float(numbers[0])

    def profiled(self) -> Kernels:
        """What the GPU does in such a step."""
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self.make(PROFILED)
        self.seconds.pop()
        spans, by_name, counts = {True: [], False: []}, Counter(), Counter()
        for event in seen.events() or ():
            if event.device_type == DeviceType.CUDA and not event.name.startswith(ANNOTATIONS):
                spans["nccl" in event.name].append((event.time_range.start, event.time_range.end))
                by_name[event.name] += event.time_range.elapsed_us() / PROFILED / 1e3
                counts[event.name] += 1 / PROFILED
        every = [*spans[True], *spans[False]]
        length = max(end for _, end in every) - min(begin for begin, _ in every)
        busy, covered = covered_by(spans[False]), covered_by(every)
        return Kernels(by_name, counts, *(us / PROFILED / 1e3 for us in (busy, covered - busy, length - covered)))


def in_turns(one: Steps, many: Steps, steps: int) -> None:
    """Make steps of both, so that both meet the same clocks."""
    for _ in range(TURNS):
        for each in (one, many):
            each.make(steps)


def covered_by(spans: Iterable[tuple[float, float]]) -> float:
    """How much of a line lies under some of the spans (begin, end)."""
    covered, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def compared(row: Row, name: str, ranks: Ranks, one: Steps, many: Steps) -> str:
    """A row's line. All processes call it together."""
    seconds = statistics.median(many.seconds)
    mine = torch.tensor([statistics.median(one.seconds)], dtype=torch.float64)
    of_each = [float(alone) for alone in ranks.gathered(mine)]
    work = 1 if row.is_shared else ranks.count
    slowest, mean = (work * alone / seconds for alone in (max(of_each), statistics.mean(of_each)))
    return (
        f"{name}: alone {', '.join(f'{1e3 * alone:.2f}' for alone in of_each)} ms; together {1e3 * seconds:.2f} ms, "
        f"{slowest:.3f} times one GPU, {mean:.3f} of the mean; "
        f"{one.peak_bytes / 2**30:.2f} and {many.peak_bytes / 2**30:.2f} GiB "
        f"({many.peak_bytes / one.peak_bytes:.3f}); loss {one.loss:.5f}, {many.loss:.5f}"
    )


def differences(share: float, one: Kernels, many: Kernels, top: int) -> list[str]:
    """What of one and of many steps differs most, if many take a `share` of one's work each."""
    lines = [
        f"  {which}: busy {step.busy:.2f}, NCCL exposed {step.exposed:.2f}, idle {step.idle:.2f} ms"
        for which, step in (("alone", one), ("together", many))
    ]
    more = {name: many.by_name[name] - share * one.by_name[name] for name in {*one.by_name, *many.by_name}}
    for name in sorted(more, key=lambda name: -abs(more[name]))[:top]:
        counts = f"{one.counts[name]:.0f}, {many.counts[name]:.0f} x"
        lines.append(f"  {more[name]:+8.3f} ms to {many.by_name[name]:8.3f} {counts:>12}  {name[:100]}")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [*rows(2)]
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=6, help=f"of each of {TURNS} turns")
    parser.add_argument("--top", type=int, default=25, help="kernels that are listed")
    options = parser.parse_args()
    ranks = Ranks.of_environment()
    with ranks.joined(torch.device(ranks.device("cuda").value), timeout=120):
        if ranks.is_first:
            print(f"{ranks.count} x {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
        for name in options.rows:
            row = rows(ranks.count)[name]
            config = config_of(row)
            one, many = Steps(alone(config), ALONE, ranks), Steps(config, ranks, ranks)
            in_turns(one, many, options.steps)
            line = compared(row, name, ranks, one, many)
            share = 1 / ranks.count if row.is_shared else 1.0
            lines = differences(share, one.profiled(), many.profiled(), options.top)
            if ranks.is_first:
                print(line, *lines, sep="\n", flush=True)
            del one, many
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
