"""Where the time of a step on many GPUs goes, kernel by kernel, beside a step of each GPU alone.

``torchrun --nproc-per-node 2 -m benchmarks.many_gpus.differences [--rows wide large 131k]``: for each row first all
GPUs at a time, each with a step of its own and nothing said between them, then the same GPUs together. A step of all
takes as long as the slowest GPU does, so `times one GPU` is of the slowest alone; `of the mean` is of all of them.

Then what the first GPU did in a step: `busy` with kernels that compute, `exposed` with NCCL's alone, `idle`; and the
kernels of which it took most more, or less, than alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.many_gpus.rows import LARGE, LONG, ONE_TEXT, WIDE, Settings
from heron.commands.bench import fresh_learner, random_batch
from heron.config import ModelConfig, TrainConfig
from heron.dist import ALONE, Ranks
from heron.train.loop import Trainer
from heron.train.step import Learner

WARM_UP, PROFILED = 4, 3  # steps; in three all is compiled, the fourth may be recorded
ANNOTATIONS = ("FSDP::", "nccl:", "Optimizer.", "ProfilerStep")  # what a profile lists beside kernels
Batches = Sequence[Sequence[Sequence[Tensor]]]


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


class Step(NamedTuple):
    """What a GPU did in a step; milliseconds, of kernels by their names."""

    seconds: float
    loss: float  # behind the steps that were timed
    peak_bytes: int
    kernels: Counter[str]
    busy: float
    exposed: float
    idle: float


def config_of(row: Row, **changes: object) -> TrainConfig:
    """The run of all processes."""
    settings = {**row.settings, **row.of_many, **changes}
    sizes = {name: settings.pop(name) for name in ("n_layer", "n_embd")}
    model = ModelConfig(variant="v7", vocab_size=65536, **sizes)
    return Trainer(TrainConfig(model=model, max_steps=1, dtype="bf16", device="cuda", **settings)).config


def alone(config: TrainConfig) -> TrainConfig:
    """The run that each process makes by itself."""
    return dataclasses.replace(config, parallel="auto", context_parallel=1, processes=0)


def measure(
    config: TrainConfig, ranks: Ranks, together: Ranks, steps: int, change: Callable[[Learner], object] = lambda _: None
) -> Step:
    """Make steps with a fresh model.

    Args:
        ranks: who share them.
        together: who begin at the same time.
        change: is done to the learner before its first step.
    """
    assert isinstance(config.model, ModelConfig)
    torch.manual_seed(config.seed)
    learner = fresh_learner(config, config.model, ranks)
    change(learner)
    torch.manual_seed(config.seed + ranks.group(config.context_parallel)[0])
    batches = [random_batch(config, config.model) for _ in range(4)]
    torch.cuda.reset_peak_memory_stats()
    timed(learner, batches, WARM_UP, together)
    seconds, loss = timed(learner, batches, steps, together)
    return profiled(learner, batches, seconds, loss, together)


def timed(learner: Learner, batches: Batches, steps: int, together: Ranks) -> tuple[float, float]:
    """Seconds of a step, the mean, and the last one's loss: the host does not wait between them."""
    torch.cuda.synchronize()
    together.all(True)
    numbers, begun = torch.full((1,), math.nan), time.perf_counter()
    for step in range(steps):
        numbers = learner.update(learner.gradients(batches[step % len(batches)]), learner.config.lr_init, math.inf)
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / steps, float(numbers[0])


def profiled(learner: Learner, batches: Batches, seconds: float, loss: float, together: Ranks) -> Step:
    """What the GPU does in such a step; and how large its memory became until here."""
    peak = torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        timed(learner, batches, PROFILED, together)
    spans, kernels = {True: [], False: []}, Counter()
    for event in seen.events() or ():
        if event.device_type != DeviceType.CUDA or event.name.startswith(ANNOTATIONS):
            continue
        spans["nccl" in event.name].append((event.time_range.start, event.time_range.end))
        kernels[event.name] += event.time_range.elapsed_us() / PROFILED / 1e3
    all_spans = [*spans[True], *spans[False]]
    if not all_spans:
        return Step(seconds, loss, peak, kernels, math.nan, math.nan, math.nan)
    length = max(end for _, end in all_spans) - min(begin for begin, _ in all_spans)
    busy, covered = covered_by(spans[False]), covered_by(all_spans)
    parts = (part / PROFILED / 1e3 for part in (busy, covered - busy, length - covered))
    return Step(seconds, loss, peak, kernels, *parts)


def covered_by(spans: Iterable[tuple[float, float]]) -> float:
    """How much of a line lies under some of the spans (begin, end)."""
    covered, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def told(row: Row, name: str, ranks: Ranks, one: Step, many: Step, top: int) -> list[str]:
    """A row's lines. All processes call it together."""
    of_each = [float(ms) for ms in ranks.gathered(torch.tensor([1e3 * one.seconds], dtype=torch.float64))]
    work = 1 if row.is_shared else ranks.count
    slowest, mean = (work * ms / (1e3 * many.seconds) for ms in (max(of_each), sum(of_each) / ranks.count))
    lines = [
        f"{name}: alone {', '.join(f'{ms:.2f}' for ms in of_each)} ms; together {1e3 * many.seconds:.2f} ms, "
        f"{slowest:.3f} times one GPU, {mean:.3f} of the mean; "
        f"{one.peak_bytes / 2**30:.2f} and {many.peak_bytes / 2**30:.2f} GiB "
        f"({many.peak_bytes / one.peak_bytes:.3f}); loss {one.loss:.5f}, {many.loss:.5f}",
        *(
            f"  {which}: busy {step.busy:.2f}, NCCL exposed {step.exposed:.2f}, idle {step.idle:.2f} ms"
            for which, step in (("alone", one), ("together", many))
        ),
    ]
    share = 1 / ranks.count if row.is_shared else 1.0
    names = {*one.kernels, *many.kernels}
    more = {kernel: many.kernels[kernel] - share * one.kernels[kernel] for kernel in names}
    for kernel in sorted(names, key=lambda kernel: -abs(more[kernel]))[:top]:
        lines.append(f"  {more[kernel]:+8.3f} ms to {many.kernels[kernel]:8.3f}  {kernel[:110]}")
    return lines


def clear() -> None:
    """Give back what the last learner had."""
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [*rows(2)]
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=12, help="timed steps")
    parser.add_argument("--top", type=int, default=25, help="kernels that are listed")
    options = parser.parse_args()
    ranks = Ranks.of_environment()
    with ranks.joined(torch.device(ranks.device("cuda").value), timeout=120):
        if ranks.is_first:
            print(f"{ranks.count} x {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
        for name in options.rows:
            row = rows(ranks.count)[name]
            config = config_of(row)
            one = measure(alone(config), ALONE, ranks, options.steps)
            clear()
            many = measure(config, ranks, ranks, options.steps)
            clear()
            lines = told(row, name, ranks, one, many, options.top)
            if ranks.is_first:
                print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
