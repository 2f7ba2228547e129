"""A training step on this CPU: tokens/s with the chunked WKV7 and with the loop. ``python benchmarks/train_cpu.py``

A step is forward, loss, backward, clipping and AdamW. The share of WKV7 is the time of its forward and backward alone,
at the shapes of the step and once for each layer, over the time of a whole step. The figures are medians of turns. Use
an idle machine: where fewer cores are free than threads are asked for, the loop's many small operators crawl.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F

import heron
from heron import machine, ops

BATCH, TOKENS = 8, 256
CONFIG = heron.ModelConfig(variant="v8", n_layer=4, n_embd=256, vocab_size=256)


def training_step(dtype: str) -> Callable[[str], None]:
    """A function that trains one step of a fresh model, given the form of WKV7."""
    torch.manual_seed(0)
    model = heron.RWKV(CONFIG)
    optimizer = heron.build_optimizer(model)
    tokens, targets = torch.randint(CONFIG.vocab_size, (2, BATCH, TOKENS))

    def step(impl: str) -> None:
        form = functools.partial(ops.wkv7, impl=impl)
        with mock.patch.object(ops, "wkv7", form), machine.autocast(dtype, torch.device("cpu")):
            loss = model.loss(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def wkv7_alone() -> Callable[[str], None]:
    """A function that runs WKV7 forward and backward at the shapes of one layer, given its form."""
    r, w, k, v, keys, iclr = torch.randn(6, BATCH, TOKENS, CONFIG.n_head, CONFIG.head_size)
    keys = F.normalize(keys, dim=-1)
    inputs = [x.requires_grad_() for x in (r, w, k, v, -keys, keys * iclr.sigmoid())]

    def run(impl: str) -> None:
        y, _ = ops.wkv7(*inputs, impl=impl)
        torch.autograd.grad(y, inputs, torch.ones_like(y))

    return run


def seconds(function: Callable[[str], None], impl: str) -> float:
    start = time.perf_counter()
    function(impl)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (default 2)")
    parser.add_argument("--rounds", type=int, default=10, help="timed turns of the chunked form (default 10)")
    parser.add_argument("--loop-rounds", type=int, default=2, help="timed turns of the loop, seconds each (default 2)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of matrix products (default fp32)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    functions = {"step": training_step(args.dtype), "wkv7": wkv7_alone()}
    taken: dict[tuple[str, str], list[float]] = {}
    for turn in range(args.rounds + 2):  # the first two warm up
        forms = ("chunked", "reference") if 2 <= turn < 2 + args.loop_rounds else ("chunked",)
        for impl in forms:
            for name, function in functions.items():
                time_taken = seconds(function, impl)
                if turn >= 2:
                    taken.setdefault((impl, name), []).append(time_taken)

    n_parameters = sum(parameter.numel() for parameter in heron.RWKV(CONFIG).parameters())
    print(
        f"{CONFIG.variant} L{CONFIG.n_layer} C{CONFIG.n_embd} N{CONFIG.head_size} V{CONFIG.vocab_size} "
        f"({n_parameters / 1e6:.2f} M parameters), B{BATCH} T{TOKENS}, {args.dtype}\n"
        f"torch {torch.__version__}, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}\n"
    )
    print(
        f"{'wkv7':<12}{'step, ms':>10}{'tokens/s':>10}{'wkv7 of a layer, ms':>21}{'share of the step':>19}{'steps':>7}"
    )
    for impl in ("chunked", "reference"):
        if (impl, "step") in taken:
            step, layer = (statistics.median(taken[impl, name]) for name in functions)
            share = CONFIG.n_layer * layer / step
            n_steps = len(taken[impl, "step"])
            speed = BATCH * TOKENS / step
            print(f"{impl:<12}{1e3 * step:>10.0f}{speed:>10.0f}{1e3 * layer:>21.1f}{share:>18.0%}{n_steps:>8}")


if __name__ == "__main__":
    main()
