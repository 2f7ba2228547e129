"""The heads of a time mix on this GPU: all between its projections and its output. ``python benchmarks/head_mix.py``

bf16, N = 64, from a zero state that nobody reads. Medians in ms, replayed from a CUDA graph, so without the launches'
cost: `forward` (nothing saved) and `f+b` (forward and backward). `compiled` is what PyTorch's compiler makes of the
definition around the kernels of WKV7; `WKV7` is those alone. The last two columns are what is left without them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from timing import median_ms, need_gpu
from torch import Tensor

from heron.model import compiled as compilation
from heron.ops import head_mix, wkv7
from heron.ops.head_mix import HeadInputs, HeadWeights

SHAPES = {"wide": (64, 512, 12), "long": (8, 2048, 32)}  # B, T, H
SIZE = 64
Call = Callable[[], object]


def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    return (mean + scale * torch.randn(shape, device="cuda")).bfloat16().requires_grad_()


def problem(batch: int, tokens: int, heads: int) -> tuple[HeadInputs, HeadWeights]:
    """Of a layer that mixes v_first in."""
    C = heads * SIZE
    inputs = HeadInputs(*(normal(batch, tokens, C) for _ in HeadInputs._fields))
    weights = HeadWeights(
        w0=normal(C, mean=-2.0),
        a0=normal(C),
        k_k=normal(C, scale=0.1, mean=0.7),
        k_a=normal(C, scale=0.1, mean=1.0),
        r_k=normal(heads, SIZE, scale=0.1),
        norm_weight=normal(C, scale=0.1, mean=1.0),
        norm_bias=normal(C),
        eps=64e-5,
        v0=normal(C),
    )
    return inputs, weights


def passes(run: Callable[[], Tensor], leaves: list[Tensor], d_y: Tensor) -> tuple[Call, Call]:
    """The forward pass of `run`, and both."""

    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(), leaves, d_y)

    return forward, both


def forms(batch: int, tokens: int, heads: int) -> dict[str, tuple[Call, Call]]:
    inputs, weights = problem(batch, tokens, heads)
    leaves = [x for x in (*inputs, *weights) if isinstance(x, Tensor)]
    d_y = torch.randn_like(inputs.r)
    compiled = compilation.compiled(lambda *given: head_mix(*given, impl="reference")[0])
    of_heads = [x.detach().view(batch, tokens, heads, SIZE).requires_grad_() for x in inputs[:4]]
    key = torch.nn.functional.normalize(of_heads[2].detach().float(), dim=-1)
    of_heads += [(-key).bfloat16().requires_grad_(), (0.5 * key).bfloat16().requires_grad_()]
    return {
        "kernels": passes(lambda: head_mix(inputs, weights, impl="cuda")[0], leaves, d_y),
        "compiled": passes(lambda: compiled(inputs, weights), leaves, d_y),
        "WKV7": passes(lambda: wkv7(*of_heads, impl="cuda")[0], of_heads, d_y.view(of_heads[0].shape)),
    }


def recorded_ms(call: Call, repeats: int) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median_ms(graph.replay, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all of them")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each (default 20)")
    args = parser.parse_args()
    need_gpu(parser)
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, N = {SIZE}, median of {args.repeats}\n")
    print(f"{'shape':<7}{'B':>4}{'T':>6}{'H':>4}  {'form':<10}{'forward':>9}{'f+b':>9}{'- WKV7':>9}{'- WKV7':>9}")
    for name in args.shapes:
        batch, tokens, heads = SHAPES[name]
        took = {
            form: [recorded_ms(call, args.repeats) for call in calls]
            for form, calls in forms(batch, tokens, heads).items()
        }
        for form, times in took.items():
            left = [one - other for one, other in zip(times, took["WKV7"], strict=True)]
            columns = "".join(f"{ms:>9.3f}" for ms in (*times, *([] if form == "WKV7" else left)))
            print(f"{name:<7}{batch:>4}{tokens:>6}{heads:>4}  {form:<10}{columns}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
