"""DeepEmbed tables that train by rows: their kernels, and whole steps. ``python benchmarks/tables.py``

Plain, it times a step with tables in host memory over one with tables on the device, small models and real text; both
take the same batches in turns, so that a busy machine disturbs both, and the figures are medians. On a CPU nothing
moves, and the time is that of the process: what is compared there is the dense optimizer with the one by rows.

On a CUDA device `--kernels` times the copies and the step of the rows alone, L12-D768 with V 65536, and `--steps_of`
whole training steps: v7, v8 with its tables on the device, and on the host. Their ids are random; or with `--text` as
uneven as those of text, drawn from 1 / (rank + 3)^1.2, 32,768 of which are some 6,000 different ones; or with `--data`
those of a text, by the World tokenizer.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time

import torch
from timing import device_of, need_gpu
from torch import Tensor

import heron
from heron import tokenizer
from heron.commands.bench import fresh_learner
from heron.data.loader import Batches, load_corpus
from heron.ops.rows import copy_rows, cuda
from heron.train.step import Learner

BATCH, TOKENS = 4, 128
LAYERS, V, WIDTH = 12, 65536, 768
SIZES = {"L12-D768": (12, 768, 64, 512), "L24-D2048": (24, 2048, 8, 2048)}  # layers, channels, batch, tokens
BLOCKS = (2, cuda.BUS_BLOCKS, 8, 24, 0)
WARM_UP = 4  # steps in which all is compiled, and a pass recorded
HEADER = "{:<34}{:>9} {:>9} {:>9} {:>9} {:>9}"


def small_models(steps: int, device: torch.device) -> None:
    print("ids      distinct  device ms  host ms  host over device")
    for n_ids, spec in ((256, "bytes"), (65536, "world")):
        model = heron.ModelConfig(variant="v8", n_layer=2, n_embd=64, head_size=32, vocab_size=n_ids)
        corpus = load_corpus("builtin:python-docs", tokenizer.load(spec), None, None, n_ids)
        batches = Batches(corpus.train, TOKENS, 0, corpus.kind)
        learners = {
            place: Learner(heron.RWKV(model), heron.TrainConfig(max_steps=1, dtype="fp32", tables=place), device)
            for place in ("device", "host")
        }
        seconds: dict[str, list[float]] = {place: [] for place in learners}
        distinct = []
        for n in range(2 + steps):
            batch = batches.batch(n * BATCH, BATCH)
            distinct.append(len(torch.unique(batch[0])))
            for place, learner in learners.items():
                begun = now(device)
                learner.update(learner.gradients([batch]), 1e-4, math.inf)
                seconds[place].append(now(device) - begun)
        on_device, on_host = (1e3 * statistics.median(seconds[place][2:]) for place in ("device", "host"))
        ids = statistics.median(distinct)
        print(f"{n_ids:<8} {ids:8.0f}  {on_device:9.1f}  {on_host:7.1f}  {on_host / on_device:.2f}")


def kernels(steps: int) -> None:
    """GPU time of each operation on the rows of all layers; GB/s of the bus, or of the memory."""
    cuda.library(torch.cuda.get_device_capability())
    host = [torch.ones(V, WIDTH).pin_memory() for _ in range(3 * LAYERS)]
    weights, moments = host[:LAYERS], host[LAYERS:]
    print(f"{f'rows of {LAYERS} tables, {WIDTH} wide':<34}{'ids':>9} {'blocks':>9} {'ms':>9} {'GB/s':>9}")
    for n in (6000, 25800):
        _of_rows(weights, moments, torch.randperm(V)[:n].sort().values.cuda(), steps)


def _of_rows(weights: list[Tensor], moments: list[Tensor], ids: Tensor, steps: int) -> None:
    n = len(ids)
    near = [torch.ones(n, WIDTH, device="cuda") for _ in range(LAYERS)]
    near_moments = [part.clone() for part in near * 2]
    counts = [torch.zeros(V, dtype=torch.int32, device="cuda") for _ in range(LAYERS)]

    def step(state: list[Tensor], at: Tensor | None) -> None:
        m, v = state[:LAYERS], state[LAYERS:]
        cuda.row_adamw_(near, m, v, counts, near, ids, None, at, 1e-6, (0.9, 0.99), 1e-18, None)

    runs = [("host to device", blocks, 1, copy_rows, (weights, ids, near, None, blocks)) for blocks in BLOCKS]
    runs += [("device to host", blocks, 1, copy_rows, (near, None, weights, ids, blocks)) for blocks in BLOCKS]
    runs += [("AdamW, moments on the host", 0, 2, step, (moments, ids))]
    runs += [("AdamW, all on the device", 0, 7, step, (near_moments, None))]
    for name, blocks, passes, run, arguments in runs:
        spent = median_ms(lambda run=run, arguments=arguments: run(*arguments), steps)
        moved = passes * n * WIDTH * 4 * LAYERS / 1e6
        print(f"{name:<34}{n:>9} {blocks or 'all':>9} {spent:9.2f} {moved / spent:9.1f}", flush=True)


def whole_steps(size: str, steps: int, text: str | bool, state: str, compiled: str) -> None:
    """Time of training steps, back to back, and the device memory they need; each learner in a process of its own."""
    print(HEADER.format(size, "ids", "ms", "k tok/s", "of v7", "GiB"), flush=True)
    plain = None
    for variant, tables in (("v7", "device"), ("v8", "device"), ("v8", "host")):
        if plain and tables == "device" and SIZES[size][1] > 1024:
            continue  # tables and moments of 36 GiB
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            distinct, spent, peak = alone.apply(_median_step, (size, variant, tables, steps, text, state, compiled))
        plain = plain or spent
        n_tokens = SIZES[size][2] * SIZES[size][3]
        print(
            f"{variant + (' ' + tables if variant != 'v7' else ''):<34}{distinct:>9.0f} {spent:9.2f} "
            f"{n_tokens / spent:9.1f} {plain / spent:9.3f} {peak / 2**30:9.2f}",
            flush=True,
        )


def samples_of(n: int, batch: int, tokens: int, text: str | bool) -> list[tuple[Tensor, Tensor]]:
    """n batches, (batch, tokens) and as much again as targets: of `text`, its name, like one (True), or random."""
    if isinstance(text, str):
        corpus = load_corpus(text, tokenizer.load("world"), None, None, V)
        batches = Batches(corpus.train, tokens, 0, corpus.kind)
        return [batches.batch(i * batch, batch) for i in range(n)]
    torch.manual_seed(0)
    weights = (torch.arange(V) + 3.0) ** -1.2 if text else torch.ones(V)
    drawn = [torch.multinomial(weights, batch * (tokens + 1), True).view(batch, -1) for _ in range(n)]
    return [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for ids in drawn]


def _median_step(
    size: str, variant: str, tables: str, steps: int, text: str | bool, state: str, compiled: str
) -> tuple[float, float, int]:
    """Distinct ids of a batch, ms of a step, and the most bytes on the device."""
    n_layer, n_embd, batch, tokens = SIZES[size]
    samples = samples_of(WARM_UP + steps + 1, batch, tokens, text)
    model = heron.ModelConfig(variant=variant, n_layer=n_layer, n_embd=n_embd, vocab_size=V)
    config = heron.TrainConfig(
        max_steps=1, micro_bsz=batch, ctx_len=tokens, dtype="bf16", device="cuda",
        tables=tables, tables_state=state, compile=compiled,
    )  # fmt: skip
    learner = fresh_learner(config, model)
    torch.cuda.reset_peak_memory_stats()
    marks = []
    for sample in samples:
        learner.update(learner.gradients([sample]), 1e-4, math.inf)
        marks.append(torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)))
    torch.cuda.synchronize()
    timed = marks[WARM_UP:]
    spent = statistics.median(a.elapsed_time(b) for a, b in zip(timed, timed[1:], strict=False))
    distinct = statistics.median(len(torch.unique(ids)) for ids, _ in samples)
    return distinct, spent, torch.cuda.max_memory_allocated()


def median_ms(run, times: int) -> float:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 3)]
    for mark in marks:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks[2:], marks[3:], strict=False))


def now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--steps_of", choices=SIZES)
    parser.add_argument("--text", action="store_true", help="ids like those of text, for --steps_of")
    parser.add_argument("--data", help="ids of this text, such as builtin:python-docs or a file, for --steps_of")
    parser.add_argument("--tables_state", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "graph", "off"))
    options = parser.parse_args()
    device = device_of(parser, options.device)
    if options.kernels or options.steps_of:
        need_gpu(parser)
    if options.kernels:
        kernels(options.steps)
    elif options.steps_of:
        text = options.data or options.text
        whole_steps(options.steps_of, options.steps, text, options.tables_state, options.compile)
    else:
        small_models(options.steps, device)


if __name__ == "__main__":
    main()
