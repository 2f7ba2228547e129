"""The loss of training in fp8 beside that in bf16. ``python benchmarks/precision.py [--steps 300]``

A v7 from scratch on Python's standard library in World tokens; all runs with the same samples in the same order, and
`bf16` and `fp8` with the same initial values. `bf16, seed 1` has others (ask for it with --runs): by how much it
differs is what such differences weigh. Printed are the mean loss of all steps and of the last 50, how far both are
above those of the first run, and the largest difference of a single step.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Sequence

import history
import torch
from timing import need_gpu

from heron import ModelConfig, TrainConfig, Trainer, tokenizer
from heron.commands.bench import fresh_learner
from heron.data.loader import Batches, load_corpus
from heron.optim import lr_at

RUNS = {"bf16": ("bf16", 0), "fp8": ("fp8", 0), "bf16, seed 1": ("bf16", 1)}  # dtype, and seed of the initial values
LAST = 50


def settings(dtype: str, options: argparse.Namespace) -> TrainConfig:
    """The run, with all that is left to the machine decided."""
    model = ModelConfig(variant="v7", n_layer=options.n_layer, n_embd=options.n_embd)
    return Trainer(TrainConfig(
        model=model, tokenizer="world", micro_bsz=options.micro_bsz, ctx_len=options.ctx_len, max_steps=options.steps,
        warmup_steps=30, lr_init=4e-4, lr_final=4e-5, dtype=dtype, device="cuda",
    )).config  # fmt: skip


def losses(dtype: str, seed: int, batches: Batches, options: argparse.Namespace) -> tuple[list[float], float]:
    """The loss of each step, and thousands of tokens/s in the second half of the run."""
    config = settings(dtype, options)
    torch.manual_seed(seed)
    learner = fresh_learner(config, config.model)
    numbers = torch.empty(config.total_steps, 4, device="cuda")
    begun = 0.0
    for step in range(config.total_steps):
        if step == config.total_steps // 2:
            torch.cuda.synchronize()
            begun = time.perf_counter()
        samples = [batches.batch(step * config.samples_per_step, config.micro_bsz)]
        numbers[step] = learner.update(learner.gradients(samples), lr_at(step, config), math.inf)
    torch.cuda.synchronize()
    n_tokens = (config.total_steps - config.total_steps // 2) * config.tokens_per_step
    speed = n_tokens / (time.perf_counter() - begun) / 1e3
    if numbers[:, 2].any():
        raise SystemExit(f"{dtype}: step {int(numbers[:, 2].argmax())} had a loss or a gradient that is not finite")
    return numbers[:, 0].tolist(), speed


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=["bf16", "fp8"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--n_layer", type=int, default=24)
    parser.add_argument("--n_embd", type=int, default=2048)
    parser.add_argument("--micro_bsz", type=int, default=8)
    parser.add_argument("--ctx_len", type=int, default=2048)
    parser.add_argument("--data", default="builtin:python-stdlib")
    history.add_flags(parser)
    options = parser.parse_args()
    need_gpu(parser)
    corpus = load_corpus(options.data, tokenizer.load("world"), None, 0.0, 65536)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; v7 L{options.n_layer}-D{options.n_embd} "
          f"B{options.micro_bsz} T{options.ctx_len}, {options.steps} steps; {len(corpus.train):,} tokens")  # fmt: skip
    titles = f"{'mean loss':>10} {f'last {LAST}':>9} {'above bf16':>12} {'last':>9} {'a step':>8} {'tokens/s':>10}"
    print(" " * 12 + titles)
    batches, first = Batches(corpus.train, options.ctx_len, 0, corpus.kind), []
    for name in options.runs:
        dtype, seed = RUNS[name]
        of_run, speed = losses(dtype, seed, batches, options)
        first = first or of_run
        apart = [mean(of_run) - mean(first), mean(of_run[-LAST:]) - mean(first[-LAST:])]
        furthest = max(abs(one - other) for one, other in zip(of_run, first, strict=True))
        print(f"{name:<12}{mean(of_run):10.4f} {mean(of_run[-LAST:]):9.4f} {apart[0]:+12.4f} {apart[1]:+9.4f} "
              f"{furthest:8.4f} {speed:9.1f}k", flush=True)  # fmt: skip
        figures = {"mean loss": mean(of_run), "last loss": mean(of_run[-LAST:]), "k tokens/s": speed}
        history.record(options, "precision.py", name, figures)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
