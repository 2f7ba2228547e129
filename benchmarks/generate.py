"""Tokens per second of the decoding engine beside the `rwkv` package. ``python benchmarks/generate.py [--constant]``

Without that package (pip install rwkv==0.8.32) Heron runs alone. Both run the same random RWKV-7 weights in one process
and take turns, a few tokens each, so that other work on the machine falls on both. Other work only ever adds time: the
ratio is that of the fastest turns, the median stands beside it. On one thread of a CPU it is the process's CPU time.
The package runs RWKV-8 files without their tables, so v8 stands beside our own v7. With --constant, instead: time per
token far into a text, and memory. With --memory, instead: what ROSA memory costs a token, beside the same model without
it, and how that grows with what it has read; with --weights int8 or int4 too, of weights of codes. With --taken,
instead: an engine of --rows places on a GPU, of which only so many are taken. With --weights int8 int4, instead: the
same weights of codes beside themselves, one text and --rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import device_of

import heron
from heron import tokenizer
from heron.generation import Snapshot
from heron.model import State
from heron.model.coded import BITS, quantize_for_running
from heron.model.memory import Recollection

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def random_model(
    variant: str,
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    memory: str | None = None,
) -> heron.RWKV:
    """Weights of ordinary size everywhere: the initial values have zeros that no trained model has."""
    config = heron.ModelConfig(variant, n_layer, n_embd, vocab_size, memory=memory)
    with torch.device("meta"):
        model = heron.RWKV(config).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("enn.weight"):
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0, 0.5 * parameter.shape[-1] ** -0.5, generator=generator)
    return model


def decoding(model: heron.RWKV, rows: int, ids: list[int], **tables) -> Callable[[], None]:
    """A function that draws a token for each of `rows` sequences."""
    engine = heron.Engine(model, tokenizer.load(f"integers:{model.config.vocab_size}"), rows, **tables)
    prompt = Snapshot(engine.prefill(ids[:-1]), (ids[-1],))
    for row in range(rows):
        engine.open((), prompt, heron.generation.Sampling(top_p=0.5), seed=row)
    return lambda: engine.step()


def partly_taken(model: heron.RWKV, rows: int, taken: list[int], turns: int, tokens: int) -> None:
    """An engine of `rows` places with so many taken: steps that compute all places, and steps that fit."""
    ids, device = tokenizer.load(f"integers:{model.config.vocab_size}"), model.emb.weight.device
    engines = {}
    for name, places, fit_steps in (
        ("one place", 1, False),
        ("all places", rows, False),
        ("steps that fit", rows, True),
    ):
        start = time.perf_counter()
        engines[name] = heron.Engine(model, ids, places, fit_steps=fit_steps)
        print(f"{name}: an engine of {places} is there after {time.perf_counter() - start:.1f} s", flush=True)
    for n in taken:
        seconds = {}
        for name, engine in engines.items():
            if n > engine.n_free:
                continue
            for seed in range(n):
                engine.open([1], sampling=heron.generation.Sampling(top_p=0.5), seed=seed)
            seconds |= in_turns({f"{n} taken, {name}": lambda engine=engine: engine.step()}, turns, tokens, device)
            for sequence, _ in engine.step():
                engine.close(sequence)
        report(seconds, dict.fromkeys(seconds, n))


def of_codes(weights: list[str], sizes: tuple, rows: int, turns: int, tokens: int, ids: list[int]) -> None:
    """One text and `rows` with weights as they are and of codes, and what these take."""
    device = sizes[-1]
    models = {"as they are": random_model("v7", *sizes)}
    for name in weights:
        start = time.perf_counter()
        models[name] = quantize_for_running(random_model("v7", *sizes), device, name)
        print(f"made and put in {name} in {time.perf_counter() - start:.1f} s", flush=True)
    for name, model in models.items():
        gb = sum(x.nbytes for x in (*model.parameters(), *model.buffers())) / 1e9
        print(f"weights {name}: {gb:.2f} GB, of which the embedding {model.emb.weight.nbytes / 1e9:.2f}")
    for n in sorted({1, rows}):
        steps = {f"{name}, {n} of {n}": decoding(model, n, ids) for name, model in models.items()}
        report(in_turns(steps, turns, tokens, device), dict.fromkeys(steps, n))


def package(path: Path, strategy: str, ids: list[int]) -> tuple[Callable[[], None], Callable[[], None]]:
    """Functions that draw a token with the `rwkv` package, and that read `ids` with it."""
    cuda = "cuda" in strategy
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1")
    os.environ.setdefault("RWKV_CUDA_ON", "1" if cuda else "0")
    from rwkv.model import RWKV
    from rwkv.utils import PIPELINE

    model = RWKV(str(path.with_suffix("")), strategy)
    pipeline = PIPELINE.__new__(PIPELINE)  # only its sampler is used; it would load a tokenizer
    now = list(model.forward(ids, None))

    def step() -> None:
        token = pipeline.sample_logits(now[0], temperature=1.0, top_p=0.5)
        now[:] = model.forward([int(token)], now[1])

    return step, lambda: model.forward(ids, None)


def in_turns(
    functions: dict[str, Callable[[], None]], turns: int, tokens: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of one call of each function in each turn of `tokens` calls."""
    is_alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if is_alone else time.perf_counter  # threads that wait take CPU time, too
    taken = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            start = clock()
            for _ in range(tokens):
                function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                taken[name].append((clock() - start) / tokens)
    return taken


def report(seconds: dict[str, list[float]], tokens: dict[str, int]) -> None:
    """One line for each function, `tokens` of which a call computes; ratios to the first."""
    best = {name: tokens[name] / min(taken) for name, taken in seconds.items()}
    print(f"\n{'':<28}{'fastest':>10}{'median':>10}  tokens/s")
    for name, taken in seconds.items():
        ratio = best[name] / next(iter(best.values()))
        print(
            f"{name:<28}{best[name]:>10.1f}{tokens[name] / statistics.median(taken):>10.1f}{ratio:>9.2f}x", flush=True
        )


def constant(device: torch.device) -> None:
    """Time per token far into a text beside that near its start, and memory over 10,000 tokens, of a small model."""
    model = random_model("v8", 4, 256, 256, torch.float32, device)
    steps = {f"behind {n:,} tokens": decoding(model, 1, torch.randint(256, (n,)).tolist()) for n in (100, 100_000)}
    seconds = in_turns(steps, 100, 5, device)
    report(seconds, dict.fromkeys(seconds, 1))
    print()
    for written in range(0, 10_001, 2_500):
        for _ in range(2_500 if written else 0):
            steps["behind 100 tokens"]()
        print(f"peak memory after {written:>6,} tokens: {peak_memory(device):.1f} MB", flush=True)


def with_memory(sizes: tuple, turns: int, tokens: int, weights: list[str]) -> None:
    """A token of a v8 with ROSA memory beside one without, behind few tokens and behind many."""
    *_, vocab_size, _, device = sizes
    rosa, steps = random_model("v8", *sizes, memory="memory"), {}
    with torch.device("meta"):
        twin = heron.RWKV(dataclasses.replace(rosa.config, memory=None))
    twin.load_state_dict(
        {key: value for key, value in rosa.state_dict().items() if key in twin.state_dict()}, assign=True
    )
    if weights:
        rosa, twin = (quantize_for_running(model, device, *weights) for model in (rosa, twin))
    steps["v8"] = decoding(twin, 1, [1] * 9)  # the same weights, where they are
    for n in (1_000, 200_000):
        engine = heron.Engine(rosa, tokenizer.load(f"integers:{vocab_size}"))
        read = Recollection(torch.randint(min(vocab_size, 256), (n,), generator=torch.Generator().manual_seed(0)))
        state = State.zeros(rosa.config, 1, device, rosa.emb.weight.dtype)  # the network need not read them too
        engine.open([1], Snapshot(dataclasses.replace(state, memory=(read,))), heron.generation.Sampling(top_p=0.5))
        steps[f"v8 with memory, behind {n:,}"] = lambda engine=engine: engine.step()
    seconds = in_turns(steps, turns, tokens, device)
    report(seconds, dict.fromkeys(seconds, 1))
    first, *others = seconds.values()
    ratios = (statistics.median(one / without for one, without in zip(other, first, strict=True)) for other in others)
    print("\ntime over that without in the same turn, median:", ", ".join(f"{ratio:.3f}" for ratio in ratios))


def peak_memory(device: torch.device) -> float:
    """Most memory of the device, or on a CPU of the process, taken so far, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--package_dtype", choices=DTYPES, default=None, help="of the rwkv package; default: the same")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=8, help="sequences of the batched figure")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt that is read")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8, help="of a turn")
    parser.add_argument("--constant", action="store_true", help="time per token far into a text, and memory")
    parser.add_argument("--memory", action="store_true", help="a token with ROSA memory beside one without")
    parser.add_argument("--taken", type=int, nargs="+", help="places that are taken, of --rows")
    parser.add_argument("--weights", nargs="+", choices=BITS, default=[], help="beside the same weights as they are")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = device_of(parser, args.device)
    if args.constant:
        constant(device)
        return
    dtype = args.dtype or ("fp32" if device.type == "cpu" else "bf16")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} threads"
    print(f"torch {torch.__version__}, {where}, L{args.n_layer}-D{args.n_embd}, V {args.vocab_size}, {dtype}\n")

    ids = torch.randint(1, args.vocab_size, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = (args.n_layer, args.n_embd, args.vocab_size, DTYPES[dtype], device)
    if args.memory:
        with_memory(sizes, args.turns, args.tokens, args.weights)
        return
    if args.weights:
        of_codes(args.weights, sizes, args.rows, args.turns, args.tokens, ids)
        return
    v7 = random_model("v7", *sizes)
    if args.taken:
        partly_taken(v7, args.rows, args.taken, args.turns, args.tokens)
        return
    writing, reading = {}, {}
    if importlib.util.find_spec("rwkv") is None:
        print("the rwkv package is not installed: Heron alone")
    else:
        with tempfile.TemporaryDirectory() as folder:
            heron.save(v7, Path(folder) / "v7.pth")
            writing["rwkv package"], reading["rwkv package"] = package(
                Path(folder) / "v7.pth", f"{device.type} {args.package_dtype or dtype}", ids
            )
    writing["heron v7"] = decoding(v7, 1, ids)
    place = {} if device.type == "cpu" else {"tables": "host", "device": device}
    writing["heron v8"] = decoding(random_model("v8", *sizes), 1, ids, **place)
    writing[f"heron v7, {args.rows} rows"] = decoding(v7, args.rows, ids)
    seconds = in_turns(writing, args.turns, args.tokens, device)
    report(seconds, {name: args.rows if "rows" in name else 1 for name in writing})
    engine = heron.Engine(v7, tokenizer.load(f"integers:{args.vocab_size}"))
    reading["heron v7"] = lambda: engine.prefill(ids)
    print(f"\nreading a prompt of {len(ids)}:")
    report(in_turns(reading, 3, 1, device), dict.fromkeys(reading, len(ids)))


if __name__ == "__main__":
    main()
