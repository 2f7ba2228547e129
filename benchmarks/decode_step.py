"""A decoding step on a GPU beside the time in which its bytes can be moved. ``python benchmarks/decode_step.py``

For each number of sequences: the step that an engine of --places places with `fit_steps` runs, the prediction (weights
read once, states read and written, at --bandwidth), and how often and how long each kind of kernel runs. With --forms,
instead: microseconds of each product of a layer, by the library (without what follows a product) and by
heron.ops.few_rows.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable
from functools import partial

import history
import torch
import torch.nn.functional as F
from generate import DTYPES, random_model
from timing import median_ms, need_gpu
from torch import Tensor

import heron
from heron.generation import step
from heron.generation.graphed import GraphedDecoder, recorded
from heron.generation.step import apart, layers_of, project, together
from heron.ops.few_rows import MOST, Product, few_rows
from heron.ops.token_step import LayerWeights

KINDS = {  # by a part of the kernel's name; the first that fits
    "whole step": ("token_step",),
    "matvec": ("matvec",),
    "few rows": ("few_rows",),
    "head step": ("head_step",),
    "norm": ("norm_mix", "layer_norm"),
    "library product": ("gemm", "nvjet", "cutlass", "splitk", "gemv", "xmma"),
    "compiled": ("triton",),
}


def predicted_ms(model: heron.RWKV, n: int, bandwidth: float, in_bf16: bool) -> float:
    """The time in which the bytes of a step of n sequences can be moved, at `bandwidth` TB/s."""
    config, weight = model.config, model.emb.weight
    weights = sum(p.nbytes for p in model.parameters()) - weight.nbytes  # a row of emb is read
    state = (2 if in_bf16 else 4) * config.n_layer * config.n_head * config.head_size**2
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


def steps(model: heron.RWKV, options: argparse.Namespace) -> None:
    places, bandwidth, config = options.places, options.bandwidth, model.config
    in_bf16 = options.states == "bf16"
    decoder = GraphedDecoder(model, places, fit_steps=True, in_bf16=in_bf16)
    what = f"{config.variant} L{config.n_layer}-D{config.n_embd}, V {config.vocab_size}"
    what += ", states bf16" if in_bf16 else ""
    print(f"{'sequences':>9}{'ms':>8}{'predicted':>11}{'tokens/s':>10}   kernels: how many, microseconds together")
    for n in options.taken:
        for sequence in range(places):
            decoder.free(sequence)
        sequences, tokens = list(range(n)), [7] * n
        ms = median_ms(lambda s=sequences, t=tokens: [decoder.step(s, t) for _ in range(10)], 5) / 10
        parts = kinds(lambda s=sequences, t=tokens: decoder.step(s, t))
        spent = ", ".join(f"{kind} {count}, {time:.0f}" for kind, (count, time) in parts.items())
        print(
            f"{n:>9}{ms:>8.3f}{predicted_ms(model, n, bandwidth, in_bf16):>11.3f}{1e3 * n / ms:>10.0f}   {spent}",
            flush=True,
        )
        history.record(options, "decode_step.py", f"{what}, {n} of {places} places", {"tokens/s": 1e3 * n / ms})


def forms(model: heron.RWKV, numbers: list[int], bandwidth: float) -> None:
    """Each product by itself, of all layers in turn: together their weights are more than a GPU's caches hold."""
    layers = layers_of(model)
    many, few, head = [together(layer) for layer in layers], [apart(layer) for layer in layers], model.head.weight
    print(f"{'':>24}{'predicted':>10}{'library':>10}{'few_rows':>10}")
    for n in numbers:
        C, wide = few[0].ffn_value.shape
        mixed, of_hidden = (torch.randn(*s, device="cuda").to(head.dtype) for s in ((6, n, C), (n, wide)))
        x = mixed[0]
        products: dict[str, Callable[[LayerWeights], list[Product]]] = {
            "output": lambda w, x=x: [Product(x, w.output, add=x)],
            "key": lambda w, x=x: [Product(x, w.ffn_key, "squared relu")],
            "value": lambda w, x=x, h=of_hidden: [Product(h, w.ffn_value, add=x)],
            "head": lambda w, x=x: [Product(x, head)],
        }
        runs: dict[str, list[Callable[[int], object]]] = {
            name: [
                lambda i, of=of: [F.linear(y.x, y.weight) for y in of(many[i])],
                lambda i, of=of: few_rows(of(few[i]), impl="cuda"),
            ]
            for name, of in products.items()
        }
        runs["projections"] = [
            lambda i, x=mixed: by_library(x, many[i]),
            lambda i, x=mixed: project(partial(few_rows, impl="cuda"), x, large(few[i]), few[i].low_rank),
        ]
        read = {name: sum(p.weight.nbytes for p in of(few[0])) for name, of in products.items()}
        read["projections"] = sum(w.nbytes for w in (*large(few[0]), *(m for part in few[0].low_rank for m in part)))
        for name, ways in runs.items():
            print(f"{n:>4} rows, {name:<13}{read[name] / bandwidth / 1e6:>10.1f}", end="")
            for run in ways:
                graph = recorded(lambda run=run: [run(i) for i in range(len(layers))])
                print(f"{1e3 * median_ms(graph.replay, 10) / len(layers):>10.1f}", end="", flush=True)
            print(flush=True)


def by_library(mixed: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor]:
    ((down, up),) = layer.low_rank
    return torch.bmm(mixed[:3], layer.joined.mT), torch.bmm(torch.bmm(mixed[2:], down.mT), up.mT)


def large(layer: LayerWeights) -> tuple[Tensor, ...]:
    return layer.receptance, layer.key, layer.value


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_layer", type=int, default=24)
    parser.add_argument("--n_embd", type=int, default=2048)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--places", type=int, default=256)
    parser.add_argument("--taken", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--states", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="TB/s that the memory is said to have")
    parser.add_argument(
        "--fewest", type=int, choices=(1, 2), default=step.FEWEST, help="FEWEST of heron.generation.step"
    )
    parser.add_argument("--forms", action="store_true", help="each product by itself")
    history.add_flags(parser)
    options = parser.parse_args()
    need_gpu(parser)
    step.FEWEST = options.fewest
    device = torch.device("cuda")
    model = random_model("v7", options.n_layer, options.n_embd, options.vocab_size, DTYPES[options.dtype], device)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, L{options.n_layer}-D{options.n_embd}\n")
    if options.forms:
        forms(model, [n for n in options.taken if 1 < n <= MOST], options.bandwidth)
    else:
        steps(model, options)


if __name__ == "__main__":
    main()
