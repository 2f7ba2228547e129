"""Fine-tuning steps on a CUDA device: their memory and speed. ``python benchmarks/finetune.py [--rows memory-lora]``

L24-D2048 with V 65536 and ctx 1024, a fresh model on random ids as frequent as those of a text, bf16, the very step of
``heron finetune``, each row in a process of its own. `memory` rows are one sample with recomputed blocks, `speed` rows
eight samples. `GiB` is the most that PyTorch had allocated at once, `reserved` the most that it had asked the driver
for: both with all weights, moments and gradients, without the few hundred MiB that CUDA itself takes. `of full` is the
time of a full step over the row's, `of v7` that of its v7 twin. Rows in int8 and nf4 need bitsandbytes. `--profile ROW`
lists what the GPU does in a step.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
from typing import NamedTuple

import history
import torch
from timing import need_gpu
from torch.profiler import ProfilerActivity, profile

from heron import RWKV, FinetuneConfig, ModelConfig, TrainConfig
from heron.commands.bench import fresh_learner
from heron.config.finetune_adapter import AdapterConfig
from heron.errors import ConfigError
from heron.train.step import Learner

V, TOKENS = 65536, 1024
WARM_UP = 4  # steps in which all is compiled


class Row(NamedTuple):
    """A model, what of it trains, and a batch."""

    method: str
    variant: str = "v7"
    micro_bsz: int = 8
    recomputed: bool = False
    kind: str = "lora"
    tables: str = "device"
    base: str = "auto"


ROWS = {
    "memory-lora": Row("lora", micro_bsz=1, recomputed=True),
    "memory-lora-v8": Row("lora", "v8", 1, True, tables="host"),
    "memory-lora-int8": Row("lora", micro_bsz=1, recomputed=True, base="int8"),
    "memory-lora-nf4": Row("lora", micro_bsz=1, recomputed=True, base="nf4"),
    "memory-state": Row("state", micro_bsz=1, recomputed=True),
    "speed-full": Row("full"),
    "speed-lora": Row("lora"),
    "speed-lora-v8": Row("lora", "v8", tables="host"),
    "speed-state": Row("state"),
    "speed-pissa": Row("lora", kind="pissa"),
    "speed-miss": Row("lora", kind="miss"),
    "speed-dora": Row("lora", kind="dora"),
}
HEADER = ("trained", "ms", "k tok/s", "of full", "of v7", "GiB", "reserved", "compile")
USUAL = [name for name in ROWS if name.startswith(("memory", "speed-full", "speed-lora"))]


class Result(NamedTuple):
    """Of a row's steps."""

    milliseconds: float  # the median
    trained: int  # parameters
    allocated: int  # bytes, the most at once
    reserved: int
    compiled: str


def learner_of(row: Row, options: argparse.Namespace) -> Learner:
    adapter = AdapterConfig(kind=row.kind, rank=options.rank) if row.method == "lora" else None
    model = ModelConfig(variant=row.variant, n_layer=options.layers, n_embd=options.channels, vocab_size=V)
    config = TrainConfig(
        model=model, micro_bsz=row.micro_bsz, ctx_len=TOKENS, max_steps=1, dtype="bf16", device="cuda", weights="bf16",
        tables=row.tables, compile=options.compile, grad_checkpoint=row.recomputed,
        finetune=FinetuneConfig(method=row.method, adapter=adapter, base=row.base),
    )  # fmt: skip
    if row.tables == "host" or row.recomputed:  # as a run does, which reads them there
        return Learner(_on_host(model), config, torch.device("cuda"))
    return fresh_learner(config, model)


def _on_host(model: ModelConfig) -> RWKV:
    """A fresh model in the host's memory. Orthogonal values would take minutes there, and any will do here."""
    with torch.device("meta"):
        network = RWKV(model)
    network.to_empty(device="cpu")
    for name, weight in network.named_parameters():
        torch.nn.init.ones_(weight) if weight.dim() == 1 or "enn" in name else torch.nn.init.normal_(weight, std=0.02)
    return network


def text_like(micro_bsz: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A batch of ids whose frequency falls with rank^-1.2: fewer rows of tables than of ids all as frequent."""
    frequencies = (torch.arange(V) + 3.0) ** -1.2
    tokens = torch.multinomial(frequencies, micro_bsz * (TOKENS + 1), replacement=True).view(micro_bsz, -1)
    return [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]


def measured(name: str, options: argparse.Namespace) -> Result:
    torch.manual_seed(0)
    learner = learner_of(ROWS[name], options)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batches = [text_like(learner.config.micro_bsz) for _ in range(WARM_UP + options.steps + 1)]
    marks = []
    for samples in batches:
        learner.update(learner.gradients(samples), 1e-4, math.inf)
        marks.append(torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)))
    torch.cuda.synchronize()
    timed = marks[WARM_UP:]
    return Result(
        statistics.median(a.elapsed_time(b) for a, b in zip(timed, timed[1:], strict=False)),
        sum(leaf.numel() for leaf in learner.trained.parameters() if leaf.requires_grad),
        torch.cuda.max_memory_allocated(),
        torch.cuda.max_memory_reserved(),
        learner.compiled.value,
    )


def profiled(name: str, options: argparse.Namespace) -> str:
    """What the GPU does in a step, the longest first."""
    learner = learner_of(ROWS[name], options)
    batches = [text_like(learner.config.micro_bsz) for _ in range(WARM_UP + 1)]
    for samples in batches[:-1]:
        learner.update(learner.gradients(samples), 1e-4, math.inf)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        learner.update(learner.gradients(batches[-1]), 1e-4, math.inf)
        torch.cuda.synchronize()
    return seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=options.top, max_name_column_width=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=USUAL)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--rank", type=int, default=32, help="of the adapters")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--profile", nargs="*", choices=ROWS, default=[], help="rows to look into")
    parser.add_argument("--top", type=int, default=30, help="kernels that a profile lists")
    history.add_flags(parser)
    options = parser.parse_args()
    need_gpu(parser)
    size = f"L{options.layers}-D{options.channels}"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {size}, ctx {TOKENS}, rank {options.rank}")
    print("{:<16}{:>14} {:>9} {:>9} {:>8} {:>6} {:>7} {:>9}  {}".format("", *HEADER))
    times: dict[str, float] = {}
    for name in options.rows:
        with multiprocessing.get_context("spawn").Pool(1) as alone:  # so that nothing of one row is left in the next
            try:
                result = alone.apply(measured, (name, options))
            except (torch.OutOfMemoryError, ConfigError) as error:
                print(f"{name:<16}{str(error).splitlines()[0]}", flush=True)
                continue
        times[name] = spent = result.milliseconds
        figures = {"step ms": spent, "peak GiB": result.allocated / 2**30}
        history.record(options, "finetune.py", f"{name} {size} rank {options.rank}", figures)
        full = times.get("speed-full") if name.startswith("speed") else None
        twin = times.get(name.removesuffix("-v8")) if name.endswith("-v8") else None
        of_full, of_v7 = "" if full is None else f"{full / spent:.2f}x", "" if twin is None else f"{twin / spent:.3f}"
        print(
            f"{name:<16}{result.trained:>14,} {spent:9.2f} {ROWS[name].micro_bsz * TOKENS / spent:9.1f} {of_full:>8} "
            f"{of_v7:>6} {result.allocated / 2**30:7.2f} {result.reserved / 2**30:9.2f}  {result.compiled}",
            flush=True,
        )
    for name in options.profile:
        print(profiled(name, options), flush=True)


if __name__ == "__main__":
    main()
