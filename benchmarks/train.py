"""Training steps on CUDA devices: tokens/s, time and memory. ``python benchmarks/train.py [--rows wide small]``

On many GPUs ``torchrun --nproc-per-node N benchmarks/train.py --rows wide``: each has the batch of its row, tokens/s
are those of all together, and memory is that of the first.

A fresh model on random tokens, bf16 or what --dtype says, warm, the median of the steps: the step of ``heron train``.
`official` is what the official trainer's model reached with its own kernels (rwkv7_clampw_v3_for_h100; bf16 weights,
fp32 masters, fused AdamW), `floor` what matrix products in bf16 at 790 TF/s and the fewest bytes at 4.3 TB/s leave room
for: both on an H200, given, not measured here. `--profile ROW` lists what the GPU does in a step of that row, and what
the host.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import history
import torch
from timing import need_gpu
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from heron import ModelConfig, TrainConfig, Trainer
from heron.commands.bench import bench, fresh_learner, random_batch
from heron.dist import Ranks


class Row(NamedTuple):
    """A model and a batch."""

    variant: str
    n_layer: int
    n_embd: int
    micro_bsz: int
    ctx_len: int
    tables: str = "device"
    official: tuple[float, float] | None = None  # thousand tokens/s, GiB
    floor: float | None = None  # thousand tokens/s
    memory: str | None = None  # "memory": ROSA memory


ROWS = {
    "wide": Row("v7", 12, 768, 64, 512, official=(252.0, 33.6), floor=654),
    "small": Row("v7", 12, 768, 16, 512, official=(122.4, 10.9), floor=609),
    "long": Row("v7", 12, 768, 8, 4096, official=(185.3, 33.6), floor=654),
    "large": Row("v7", 24, 2048, 8, 2048, official=(42.0, 88.9), floor=78),
    "wide-v8": Row("v8", 12, 768, 64, 512),
    "wide-memory": Row("v7", 12, 768, 64, 512, memory="memory"),
    "wide-v8-memory": Row("v8", 12, 768, 64, 512, memory="memory"),
    "wide-v8-host": Row("v8", 12, 768, 64, 512, tables="host"),
    "large-v8-host": Row("v8", 24, 2048, 8, 2048, tables="host"),  # 4.7 G parameters, 3.2 G of them in tables
}
PROFILED_STEPS = 3


def settings(row: Row, options: argparse.Namespace) -> tuple[TrainConfig, ModelConfig]:
    """The run of a row, with all that is left to the machine decided."""
    sizes = dict(n_layer=options.layers or row.n_layer, n_embd=row.n_embd)
    model = ModelConfig(variant=row.variant, rosa=row.memory, **sizes)
    config = TrainConfig(
        model=model, micro_bsz=row.micro_bsz, ctx_len=row.ctx_len, tables=row.tables, max_steps=1, dtype=options.dtype,
        device="cuda", weights=options.weights, compile=options.compile, grad_checkpoint=options.grad_checkpoint,
        parallel=options.parallel,
    )  # fmt: skip
    return Trainer(config).config, model


def measured(name: str, options: argparse.Namespace, ranks: Ranks) -> str:
    """A line of the table."""
    row = ROWS[name]
    result = bench(*settings(row, options), options.steps, ranks)
    speed = result.tokens_per_s / 1e3
    if ranks.is_first:
        figures = {"k tokens/s": speed, "step ms": 1e3 * result.seconds, "peak GiB": result.peak_bytes / 2**30}
        precision = "" if options.dtype == "bf16" else f" in {options.dtype}"
        history.record(options, "train.py", f"{name}{precision} on {ranks.count}", figures)
    official = "" if row.official is None else f"{row.official[0]:8.1f}k {row.official[1]:6.1f}"
    share = "" if row.floor is None else f"{speed / row.floor / ranks.count:6.0%} of {ranks.count * row.floor:.0f}k"
    return (
        f"{name:<15}{row.variant} L{row.n_layer}-D{row.n_embd} B{row.micro_bsz} T{row.ctx_len}".ljust(38)
        + f"{speed:8.1f}k {1e3 * result.seconds:8.2f} {1e3 * result.gradients_seconds:8.2f} "
        + f"{1e3 * result.update_seconds:7.2f} {result.peak_bytes / 2**30:7.2f}  {official:<16} {share}"
    )


def profiled(name: str, options: argparse.Namespace) -> str:
    """What the GPU does in a step, the longest first, and how long the host takes to ask for it."""
    config, model = settings(ROWS[name], options)
    learner = fresh_learner(config, model)
    batches = [random_batch(config, model) for _ in range(PROFILED_STEPS)]

    def steps() -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for samples in batches:
            learner.update(learner.gradients(samples), config.lr_init, math.inf)
        asked = time.perf_counter() - begun
        torch.cuda.synchronize()
        return asked / PROFILED_STEPS

    for _ in range(2):
        host = steps()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        steps()
    averages = seen.key_averages()
    kernels = [event for event in averages if event.device_type == DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in kernels) / PROFILED_STEPS / 1e3
    launches = sum(event.count for event in kernels) / PROFILED_STEPS
    lines = [f"{name}: GPU {busy:.2f} ms, {launches:.0f} kernels and copies; host {1e3 * host:.2f} ms; of a step"]
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[: options.top]:
        spent = event.self_device_time_total / PROFILED_STEPS / 1e3
        lines.append(f"{spent:9.3f} ms {spent / busy:6.1%} {event.count / PROFILED_STEPS:7.1f} x  {event.key[:150]}")
    lines.append(averages.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60))
    return "\n".join(lines)


def lines(options: argparse.Namespace, ranks: Ranks) -> Iterator[str]:
    """What is printed, as it is measured."""
    many = f"{ranks.count} x " if ranks.count > 1 else ""
    yield f"{many}{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.dtype}, compile {options.compile}"
    if options.rows:
        titles = f"{'tokens/s':>9} {'step ms':>8} {'f+b':>8} {'update':>7} {'GiB':>7}  {'official':<16} of the floor"
        yield " " * 38 + titles
    for name in options.rows:
        try:
            yield measured(name, options, ranks)
        except torch.OutOfMemoryError as error:
            yield f"{name:<15}{str(error).splitlines()[0]}"
    for name in options.profile:
        yield profiled(name, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--profile", nargs="*", choices=ROWS, default=[], help="rows to look into")
    parser.add_argument("--top", type=int, default=40, help="kernels that a profile lists")
    parser.add_argument("--layers", type=int, help="other than the row's: two compile what any number uses")
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "graph", "off"))
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp8", "fp32"))
    parser.add_argument("--weights", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--grad_checkpoint", action="store_true")
    parser.add_argument("--parallel", default="auto", choices=("auto", "ddp", "fsdp", "hsdp"))
    history.add_flags(parser)
    options = parser.parse_args()
    need_gpu(parser, "; benchmarks/train_cpu.py needs none")
    ranks = Ranks.of_environment()
    with ranks.joined(torch.device(ranks.device("cuda").value), timeout=300):
        for line in lines(options, ranks):
            if ranks.is_first:
                print(line, flush=True)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
