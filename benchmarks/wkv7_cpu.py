"""WKV7 on this CPU: the chunked form against the loop, medians in ms. ``python benchmarks/wkv7_cpu.py [--threads 2]``

The two take turns, so that other work on the machine falls on both; quote the ratio, not the milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from heron.ops import wkv7

TRAINING = ((8, 256, 4, 64), (8, 256, 4, 32), (16, 256, 8, 16), (1, 256, 4, 64))
PREFILL = ((1, 1024, 12, 64), (1, 64, 12, 64))


def inputs(batch: int, tokens: int, heads: int, size: int, requires_grad: bool) -> list[torch.Tensor]:
    r, w, k, v, keys, iclr = torch.randn(6, batch, tokens, heads, size)
    keys = F.normalize(keys, dim=-1)
    return [x.requires_grad_(requires_grad) for x in (r, w, k, v, -keys, keys * iclr.sigmoid())]


def milliseconds(impl: str, tensors: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    y, _ = wkv7(*tensors, impl=impl)
    if y.requires_grad:
        torch.autograd.grad(y.sum(), tensors)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each form (default 5)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    print(f"torch {torch.__version__}, {args.threads} threads, fp32, median of {args.rounds}\n")
    print(f"{'pass':<18}{'B':>4}{'T':>6}{'H':>4}{'N':>4}{'loop, ms':>12}{'chunked, ms':>13}{'ratio':>8}")
    for name, shapes, training in (("forward+backward", TRAINING, True), ("forward", PREFILL, False)):
        for shape in shapes:
            tensors = inputs(*shape, requires_grad=training)
            times = {"reference": [], "chunked": []}
            for _ in range(args.rounds):
                for impl, taken in times.items():
                    milliseconds(impl, tensors)  # untimed: it also pays for giving back what the other form had taken
                    taken.append(milliseconds(impl, tensors))
            loop, chunked = (statistics.median(taken) for taken in times.values())
            columns = "".join(f"{x:>{width}}" for x, width in zip(shape, (4, 6, 4, 4), strict=True))
            print(f"{name:<18}{columns}{loop:>12.1f}{chunked:>13.1f}{loop / chunked:>7.1f}x", flush=True)


if __name__ == "__main__":
    main()
