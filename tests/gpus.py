"""Steps on two GPUs for tests/test_dist_gpu.py, which starts `torchrun --nproc-per-node 2 -m tests.gpus FILE`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

import heron
from heron.commands.bench import fresh_learner, random_batch
from heron.dist import Ranks

STEPS = 7  # of which the fourth is recorded
MODEL = heron.ModelConfig(variant="v7", n_layer=3, n_embd=128, vocab_size=512)
TOGETHER = {
    "ddp": dict(parallel="ddp"),
    "fsdp": dict(parallel="fsdp"),
    "spans": dict(parallel="ddp", context_parallel=2),
    "spans-fsdp": dict(parallel="fsdp", context_parallel=2),
    "half-fsdp": dict(parallel="fsdp", dtype="bf16", accumulate=2),
}


def losses(ranks: Ranks, **settings: object) -> list[float]:
    """The losses of some steps over two batches in turn, which depend on the group of processes alone."""
    values = dict(micro_bsz=2, ctx_len=128, max_steps=1, dtype="fp32", device="cuda", lr_init=1e-3) | settings
    config = heron.Trainer(heron.TrainConfig(model=MODEL, **values)).config
    torch.manual_seed(0)
    learner = fresh_learner(config, MODEL, ranks)
    torch.manual_seed(1 + ranks.group(config.context_parallel)[0])
    batches, found = [random_batch(config, MODEL) for _ in range(2)], []
    for step in range(STEPS):
        numbers = learner.update(learner.gradients(batches[step % 2]), config.lr_init, math.inf)
        found.append(float(numbers[0]))
    passes = getattr(learner._passes, "graphs", {})
    assert bool(passes) == (settings["compile"] == "graph")
    return found


def main(file: Path) -> None:
    """Write the losses of all ways, compiled, and compiled and recorded."""
    ranks = Ranks.of_environment()
    with ranks.joined(torch.device(ranks.device("cuda").value), 60):
        found = {}
        for name, settings in TOGETHER.items():
            for compiled in ("on", "graph"):
                found[f"{name}-{compiled}"] = losses(ranks, compile=compiled, **settings)
                print(f"rank {ranks.rank}: {name}, compile {compiled}: {found[f'{name}-{compiled}']}", flush=True)
    if ranks.is_first:
        file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
