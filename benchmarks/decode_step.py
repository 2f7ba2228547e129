"""A decoding step on a GPU beside the time in which its bytes can be moved. ``python benchmarks/decode_step.py``

For each number of sequences: the step that an engine of --places places with `fit_steps` runs, the prediction (weights
read once, states read and written, at --bandwidth), and how often and how long each kind of kernel runs. With --forms,
instead: ways to compute the products that a head step waits for, as they are now and others, by themselves, a layer.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable

import torch
from generate import DTYPES, random_model
from timing import median_ms, need_gpu
from torch import Tensor

import heron
from heron.generation.graphed import GraphedDecoder, recorded
from heron.generation.step import apart, for_one, layers_of, project_together, together
from heron.model.compiled import compiled
from heron.ops.token_step import LayerWeights

KINDS = {  # by a part of the kernel's name; the first that fits
    "matvec": ("matvec",),
    "head step": ("head_step",),
    "norm": ("norm_mix", "layer_norm"),
    "library product": ("gemm", "nvjet", "cutlass", "splitk", "gemv", "xmma"),
    "compiled": ("triton",),
}


def predicted_ms(model: heron.RWKV, n: int, bandwidth: float) -> float:
    """The time in which the bytes of a step of n sequences can be moved, at `bandwidth` TB/s."""
    config, weight = model.config, model.emb.weight
    weights = sum(p.nbytes for p in model.parameters()) - weight.nbytes  # a row of emb is read
    state = 4 * config.n_layer * config.n_head * config.head_size**2
    logits = config.vocab_size * weight.itemsize
    return (weights + n * (2 * state + 2 * logits)) / bandwidth / 1e9


def kinds(run: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """How many kernels of each kind a call launches, and their microseconds together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
    for event in profile.key_averages():
        if event.self_device_time_total:
            name = event.key.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "rest")
            count, time = found[kind]
            found[kind] = count + event.count, time + event.self_device_time_total
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def steps(model: heron.RWKV, places: int, numbers: list[int], bandwidth: float) -> None:
    decoder = GraphedDecoder(model, places, fit_steps=True)
    print(f"{'sequences':>9}{'ms':>8}{'predicted':>11}{'tokens/s':>10}   kernels: how many, microseconds together")
    for n in numbers:
        for sequence in range(places):
            decoder.free(sequence)
        sequences, tokens = list(range(n)), [7] * n
        ms = median_ms(lambda s=sequences, t=tokens: [decoder.step(s, t) for _ in range(10)], 5) / 10
        parts = kinds(lambda s=sequences, t=tokens: decoder.step(s, t))
        spent = ", ".join(f"{kind} {count}, {time:.0f}" for kind, (count, time) in parts.items())
        print(f"{n:>9}{ms:>8.3f}{predicted_ms(model, n, bandwidth):>11.3f}{1e3 * n / ms:>10.0f}   {spent}", flush=True)


def squeezed(x: Tensor) -> Tensor:
    return torch.stack((x[0], torch.tanh(x[1]), x[2], torch.sigmoid(x[3])))


class Abreast:
    """The products of `project_together` on streams of their own: of few rows, one leaves most of a GPU idle."""

    def __init__(self, squeeze: Callable[[Tensor], Tensor]):
        self._streams, self._squeeze = [torch.cuda.Stream() for _ in range(3)], squeeze

    def __call__(self, mixed: Tensor, layer: LayerWeights) -> list[Tensor]:
        now, products = torch.cuda.current_stream(), []
        for stream, x, weight in zip(self._streams, mixed[:3], large(layer), strict=True):
            stream.wait_stream(now)
            with torch.cuda.stream(stream):
                products.append(x @ weight.t())
        products += low_rank(mixed, layer, self._squeeze)
        for stream in self._streams:
            now.wait_stream(stream)
        return products


def large(layer: LayerWeights) -> tuple[Tensor, ...]:
    return layer.receptance, layer.key, layer.value


def low_rank(mixed: Tensor, layer: LayerWeights, squeeze: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    ((down, up),) = layer.low_rank
    return torch.bmm(squeeze(torch.bmm(mixed[2:], down.mT)), up.mT).unbind()


def forms(model: heron.RWKV, numbers: list[int], bandwidth: float) -> None:
    layers, squeeze, now = layers_of(model), compiled(squeezed), compiled(project_together)
    many, one = [together(layer) for layer in layers], [apart(layer) for layer in layers]
    joined = [torch.stack(large(layer)) for layer in layers]
    single, abreast = for_one(one[0], compiled), Abreast(squeeze)
    for n in numbers:
        mixed = torch.randn(6, n, model.config.n_embd, device="cuda").to(model.emb.weight.dtype)
        of_layer = {
            "as now": lambda i, x=mixed: now(x, large(many[i]), many[i].low_rank),
            "on four streams": lambda i, x=mixed: abreast(x, many[i]),
            "r, k, v as one": lambda i, x=mixed: (torch.bmm(x[:3], joined[i].mT), low_rank(x, many[i], squeeze)),
            "matvec, one by one": lambda i, x=mixed: [
                single.project(x[:, j : j + 1].contiguous(), large(one[i]), one[i].low_rank) for j in range(len(x[0]))
            ],
        }
        if n > 4:
            del of_layer["matvec, one by one"]
        read = sum(x.nbytes for x in (*large(many[0]), *many[0].low_rank[0]))
        print(f"{n:>3} sequences, predicted {read / bandwidth / 1e6:6.1f} us a layer:", end="")
        for name, run in of_layer.items():
            graph = recorded(lambda run=run: [run(i) for i in range(len(layers))])
            print(f"   {name} {1e3 * median_ms(graph.replay, 20) / len(layers):.1f}", end="", flush=True)
        print(flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_layer", type=int, default=24)
    parser.add_argument("--n_embd", type=int, default=2048)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--places", type=int, default=256)
    parser.add_argument("--taken", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--bandwidth", type=float, default=4.8, help="TB/s that the memory is said to have")
    parser.add_argument("--forms", action="store_true", help="ways to compute the products before a head step")
    options = parser.parse_args()
    need_gpu(parser)
    device = torch.device("cuda")
    model = random_model("v7", options.n_layer, options.n_embd, options.vocab_size, DTYPES[options.dtype], device)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, L{options.n_layer}-D{options.n_embd}\n")
    if options.forms:
        forms(model, [n for n in options.taken if 1 < n <= 64], options.bandwidth)
    else:
        steps(model, options.places, options.taken, options.bandwidth)


if __name__ == "__main__":
    main()
