"""One text over several GPUs: training steps in spans against one GPU with all of it.

``torchrun --nproc-per-node 2 benchmarks/context.py [--tokens 131072]`` trains a fresh v7 on random tokens, bf16,
warm, and prints the median step: first of one GPU (rank 0, the others wait; not with ``--together``), then of all.
``--grad_checkpoint --together --tokens 1048576`` is for a text that one GPU has no room for. `loss` and `norm` are of
the first step; between one GPU and several they differ by rounding alone.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from timing import need_gpu
from torch import Tensor

from heron import ModelConfig, TrainConfig, Trainer
from heron.commands.bench import fresh_learner
from heron.context import Context
from heron.train.step import Learner

WARM_UP = 3


class Measured(NamedTuple):
    """Of a step."""

    seconds: float
    gradients_seconds: float
    loss: float
    grad_norm: float
    peak_bytes: int


def step(learner: Learner, text: tuple[Tensor, Tensor], context: Context | None) -> tuple[Tensor, float]:
    """Loss and gradient norm of a step, and when its gradients were there."""
    network, span, share = learner.network, None, 1.0
    if context is not None:
        part = context.part(*text)
        text, span, share = (part.tokens, part.targets), part.span, part.share
    tokens, targets = (part.to(learner.device) for part in text)
    loss = network.loss(tokens, targets, span=span) * share
    loss.backward()
    loss = loss.detach()
    if context is not None:
        add_up([loss, *(leaf.grad for leaf in network.parameters() if leaf.grad is not None)])
    torch.cuda.synchronize()
    there = time.perf_counter()
    return learner.update(loss, learner.config.lr_init, math.inf), there


def add_up(tensors: list[Tensor]) -> None:
    """Sum each over all processes, in place."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        block = torch.cat([tensor.flatten() for tensor in alike])
        dist.all_reduce(block)
        for tensor, part in zip(alike, block.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))


def measure(config: TrainConfig, model: ModelConfig, steps: int, context: Context | None) -> Measured:
    """Some steps over texts that are the same on every process."""
    torch.manual_seed(config.seed)
    learner = fresh_learner(config, model)
    draw = torch.Generator().manual_seed(config.seed)
    torch.cuda.reset_peak_memory_stats()
    times, first = [], None
    for _ in range(WARM_UP + steps):
        ids = torch.randint(0, model.vocab_size, (1, config.ctx_len + 1), generator=draw)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        numbers, there = step(learner, (ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), context)
        torch.cuda.synchronize()
        times.append((there - begun, time.perf_counter() - begun))
        first = numbers.tolist() if first is None else first
    gradients, whole = (statistics.median(column) for column in zip(*times[WARM_UP:], strict=True))
    return Measured(whole, gradients, *first[:2], torch.cuda.max_memory_allocated())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--compile", default="on", choices=("on", "off"))
    parser.add_argument("--grad_checkpoint", action="store_true")
    parser.add_argument("--together", action="store_true", help="all GPUs alone, not one before")
    options = parser.parse_args()
    need_gpu(parser)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if size > 1:
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    model = ModelConfig(variant="v7", n_layer=options.n_layer, n_embd=options.n_embd)
    config = TrainConfig(
        model=model, micro_bsz=1, ctx_len=options.tokens, max_steps=1, dtype="bf16", device="cuda",
        compile=options.compile, grad_checkpoint=options.grad_checkpoint,
    )  # fmt: skip
    config = Trainer(config).config
    if rank == 0:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, compile {options.compile}")
        print(f"v7 L{options.n_layer}-D{options.n_embd}, one text of {options.tokens:,} tokens")
        print(f"{'GPUs':>4} {'step ms':>9} {'f+b ms':>9} {'tokens/s':>10} {'GiB':>7} {'loss':>9} {'norm':>9}")
    alone = None
    for n in (1, size) if size > 1 else (1,):
        if n == 1 and size > 1 and options.together:
            continue
        if n > 1 or rank == 0:
            context = Context() if n > 1 else None
            found = measure(config, model, options.steps, context)
            if context is not None:
                context.close()
            if rank == 0:
                times = f"{1e3 * found.seconds:9.1f} {1e3 * found.gradients_seconds:9.1f}"
                ratio = "" if alone is None else f"  {alone.seconds / found.seconds:.2f}x"
                speed = f"{options.tokens / found.seconds:10,.0f} {found.peak_bytes / 2**30:7.2f}"
                print(f"{n:4d} {times} {speed} {found.loss:9.5f} {found.grad_norm:9.5f}{ratio}", flush=True)
            alone = found
        gc.collect()
        torch.cuda.empty_cache()
        if size > 1:
            dist.barrier()
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
