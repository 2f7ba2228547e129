"""Steps on two GPUs for tests/test_dist_gpu.py, which starts `torchrun --nproc-per-node 2 -m tests.gpus FILE`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import heron
from heron.commands.bench import fresh_learner, random_batch
from heron.dist import Ranks
from heron.train.step import Learner

STEPS = 7  # of which the fourth is recorded
MODEL = heron.ModelConfig(variant="v7", n_layer=3, n_embd=128, vocab_size=512)
TOGETHER = {
    "ddp": dict(parallel="ddp"),
    "fsdp": dict(parallel="fsdp"),
    "spans": dict(parallel="ddp", context_parallel=2),
    "spans-fsdp": dict(parallel="fsdp", context_parallel=2),
    "half-fsdp": dict(parallel="fsdp", dtype="bf16", accumulate=2),
    "tables": dict(parallel="ddp", variant="v8"),
    "tables-host": dict(parallel="ddp", variant="v8", tables="host"),
}


def steps(ranks: Ranks, variant: str = "v7", **settings: object) -> Iterator[tuple[float, Learner]]:
    """Make steps over two batches in turn, which depend on the group of processes alone: their losses, the learner."""
    model = dataclasses.replace(MODEL, variant=variant)
    values = dict(micro_bsz=2, ctx_len=128, max_steps=1, dtype="fp32", device="cuda", lr_init=1e-3) | settings
    config = heron.Trainer(heron.TrainConfig(model=model, **values)).config
    torch.manual_seed(0)
    learner = fresh_learner(config, model, ranks)
    torch.manual_seed(1 + ranks.group(config.context_parallel)[0])
    for samples in itertools.cycle([random_batch(config, model) for _ in range(2)]):
        numbers = learner.update(learner.gradients(samples), config.lr_init, math.inf)
        yield float(numbers[0]), learner


def losses(ranks: Ranks, **settings: object) -> list[float]:
    """Those of some steps."""
    found, learners = zip(*itertools.islice(steps(ranks, **settings), STEPS), strict=True)
    passes = getattr(learners[-1]._passes, "graphs", {})
    assert bool(passes) == (settings["compile"] == "graph")
    return list(found)


def copies(ranks: Ranks) -> int:
    """How often copy engines write to the other GPU in a step over shards."""
    made = steps(ranks, parallel="fsdp", compile="off")
    next(made)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        next(made)
    return sum("Memcpy PtoP" in event.name for event in seen.events() or ())


def main(file: Path) -> None:
    """Write the losses of all ways, compiled, and compiled and recorded."""
    ranks = Ranks.of_environment()
    with ranks.joined(torch.device(ranks.device("cuda").value), 60):
        found: dict[str, object] = {"copies": copies(ranks)}
        for name, settings in TOGETHER.items():
            for compiled in ("on", "graph"):
                found[f"{name}-{compiled}"] = losses(ranks, compile=compiled, **settings)
                print(f"rank {ranks.rank}: {name}, compile {compiled}: {found[f'{name}-{compiled}']}", flush=True)
    if ranks.is_first:
        file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
