"""WKV7 on a CUDA device: time, memory and error of each form. ``python benchmarks/wkv7.py [--shapes main small]``

bf16, state in fp32. Times are medians in ms with a cold L2 cache: `forward` (nothing saved), `f+b` (forward and
backward, launched from Python) and `graph` (our kernels replayed from a CUDA graph, so without the launches' cost).
`GiB` is the peak of memory beyond the inputs and the gradient of y. Errors are ||got - true|| / ||true|| against the
chunked form in fp64, on two heads of the first row. flash-linear-attention and FlashRWKV2 take part where they are
installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import need_gpu
from torch import Tensor

from heron.ops import wkv7

SHAPES = {  # B, T, H, N
    "main": (8, 4096, 64, 64),
    "small": (16, 512, 12, 64),
    "wide": (64, 512, 12, 64),
    "long": (1, 65536, 32, 64),
    "heads": (8, 4096, 32, 128),
}
FORMS = ("cuda", "chunked", "fla", "flashrwkv2")
NAMES = ("y", "state", "dr", "dw", "dk", "dv", "da", "db")


def inputs(batch: int, tokens: int, heads: int, size: int) -> list[Tensor]:
    """r, w, k, v, a, b like a model's, in bf16, and then the gradient of y."""
    shape = (batch, tokens, heads, size)
    r, k, v, keys, iclr, dy, noise = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(7))
    keys = F.normalize(keys, dim=-1)
    channels = torch.empty(heads, size, device="cuda").uniform_(-6, 3)
    w = (channels + 0.7 * noise).bfloat16()
    return [r, w, k, v, -keys, keys * iclr.sigmoid(), dy]


def fla_wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's chunked form, which takes log decays and keeps states as (key, value)."""
    from fla.ops.rwkv7 import chunk_rwkv7

    log_decay = -math.exp(-0.5) * w.float().sigmoid()
    y, state = chunk_rwkv7(r, log_decay, k, v, a, b, scale=1.0, output_final_state=True)
    return y, state.mT


def flashrwkv2_wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """FlashRWKV2's recurrence, which takes packed sequences and keeps states as (key, value). It tunes itself first."""
    from flashrwkv2.tmix.wkv7.tilelang import tmix_wkv7_recurrent

    batch, tokens, heads, size = r.shape
    zeros = torch.zeros(batch, heads, size, size, device=r.device)
    begins = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=r.device)
    y, state = tmix_wkv7_recurrent(*(x.flatten(0, 1) for x in (r, w, k, v, a, b)), zeros, begins)
    return y.view(r.shape), state.mT


def forms() -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    found = {impl: (lambda *x, impl=impl: wkv7(*x, impl=impl)) for impl in ("cuda", "chunked")}
    of_others = {"fla": fla_wkv7, "flashrwkv2": flashrwkv2_wkv7}
    return found | {name: form for name, form in of_others.items() if importlib.util.find_spec(name) is not None}


def median_ms(call: Callable[[], object], rounds: int) -> float:
    flushed = torch.empty(2**28, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for _ in range(3):
        call()
    for start, end in events:
        flushed.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def errors(got: tuple[Tensor, ...], tensors: list[Tensor]) -> dict[str, float]:
    """Of y, the final state and the six gradients, on heads 0 and 1 of row 0."""

    def part(x: Tensor) -> Tensor:
        return x[:1, :, :2].detach().double()

    leaves = [part(x).requires_grad_() for x in tensors[:6]]
    y, state = wkv7(*leaves, impl="chunked")
    want = (y.detach(), state.detach(), *torch.autograd.grad(y, leaves, part(tensors[6])))
    mine = (part(got[0]), got[1][:1, :2].detach().double(), *map(part, got[2:]))
    return {
        name: float((one - other).norm() / other.norm()) for name, one, other in zip(NAMES, mine, want, strict=True)
    }


def measure(name: str, tensors: list[Tensor], rounds: int) -> dict[str, object]:
    form = forms()[name]
    leaves, dy = [x.requires_grad_() for x in tensors[:6]], tensors[6]

    def forward() -> None:
        with torch.no_grad():
            form(*leaves)

    def both() -> tuple[Tensor, ...]:
        y, state = form(*leaves)
        return (y, state, *torch.autograd.grad(y, leaves, dy))

    found: dict[str, object] = {"errors": errors(both(), tensors)}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    found["GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    found["forward"] = median_ms(forward, rounds)
    found["f+b"] = median_ms(both, rounds)
    found["graph"] = median_ms(graph_of(both), rounds) if name == "cuda" else math.nan
    return found


def measure_step(batch: int, heads: int, rounds: int) -> tuple[float, float]:
    """ms of one token for `batch` sequences, and the GB/s that it moves."""
    tensors = inputs(batch, 1, heads, 64)[:6]
    state = torch.randn(batch, heads, 64, 64, device="cuda")
    step = graph_of(lambda: wkv7(*tensors, state, impl="cuda"))
    ms = median_ms(step, rounds)
    return ms, (2 * state.nbytes + 7 * tensors[0].nbytes) / ms / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all of them")
    parser.add_argument("--forms", nargs="+", choices=FORMS, help="default: those that there are")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each (default 30)")
    args = parser.parse_args()
    need_gpu(parser, "; benchmarks/wkv7_cpu.py needs none")
    torch.manual_seed(0)

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, median of {args.rounds}\n")
    columns = f"{'shape':<7}{'B':>4}{'T':>7}{'H':>4}{'N':>5}"
    print(f"{columns}  {'form':<11}{'forward':>9}{'f+b':>9}{'graph':>9}{'GiB':>7}  x 1e-3:")
    for name in args.shapes:
        for form in forms():
            if args.forms and form not in args.forms:
                continue
            columns = f"{name:<7}" + "".join(f"{x:>{n}}" for x, n in zip(SHAPES[name], (4, 7, 4, 5), strict=True))
            try:
                found = measure(form, inputs(*SHAPES[name]), args.rounds)
            except torch.OutOfMemoryError:
                print(f"{columns}  {form:<11} out of memory", flush=True)
                continue
            times = "".join(f"{found[key]:>9.3f}" for key in ("forward", "f+b", "graph"))
            off = " ".join(f"{key} {1e3 * value:.2f}" for key, value in found["errors"].items())
            print(f"{columns}  {form:<11}{times}{found['GiB']:>7.2f}  {off}", flush=True)
    if not args.forms or "cuda" in args.forms:
        for batch, heads in ((1, 32), (256, 32)):
            ms, rate = measure_step(batch, heads, args.rounds)
            print(f"one token, B {batch}, H {heads}: {1e3 * ms:.1f} us, {rate:.0f} GB/s")


if __name__ == "__main__":
    main()
