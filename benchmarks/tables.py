"""A training step, DeepEmbed tables in host memory over tables on the device. ``python benchmarks/tables.py``

Both take the same batches of real text in turns, so that a busy machine disturbs both; the figures are medians. On a
CPU nothing moves, and the time is that of the process: what is compared is the dense optimizer with the one by rows.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch

import heron
from heron import machine, tokenizer
from heron.data.loader import Batches, load_corpus
from heron.learner import Learner

BATCH, TOKENS = 4, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = torch.device(machine.choose_device(options.device).value)
    print("ids      distinct  device ms  host ms  host over device")
    for V, spec in ((256, "bytes"), (65536, "world")):
        model = heron.ModelConfig(variant="v8", n_layer=2, n_embd=64, head_size=32, vocab_size=V)
        corpus = load_corpus("builtin:python-docs", tokenizer.load(spec), None, None, V)
        batches = Batches(corpus.train, TOKENS, 0, corpus.kind)
        learners = {
            place: Learner(heron.RWKV(model), heron.TrainConfig(max_steps=1, dtype="fp32", tables=place), device)
            for place in ("device", "host")
        }
        seconds: dict[str, list[float]] = {place: [] for place in learners}
        distinct = []
        for n in range(2 + options.steps):
            batch = batches.batch(n * BATCH, BATCH)
            distinct.append(len(torch.unique(batch[0])))
            for place, learner in learners.items():
                begun = now(device)
                learner.update(learner.gradients([batch]), 1e-4, math.inf)
                seconds[place].append(now(device) - begun)
        on_device, on_host = (1e3 * statistics.median(seconds[place][2:]) for place in ("device", "host"))
        print(f"{V:<8} {statistics.median(distinct):8.0f}  {on_device:9.1f}  {on_host:7.1f}  {on_host / on_device:.2f}")


def now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
