"""ROSA on this CPU, against a plain suffix automaton in Python and, where it is installed, rosa-torch from PyPI.

``python benchmarks/rosa_op.py [--threads 2] [--parts gradients]`` prints best times; quote the ratios. The forms take
turns, and each turn of a fast one is many runs, so that other work on the machine falls on all of them. rosa-torch
(``pip install 'rosa-torch[numba]' rosa-torch-native``) chooses its own backend and compiles before it is timed. Where
there is a GPU, its times follow.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from timing import median_ms
from torch import Tensor

from heron.ops.rosa import rosa, rosa_last, soft

CROWD = (768, 512)
LENGTHS = (2048, 4096, 8192, 16384)
ON_GPU = ((9216, 512), (9216, 1024), (9216, 2048), (768, 4096))
SOFT_BITS = 4
SOFT = {"cpu": ((48, 128), (48, 512)), "cuda": ((384, 128), (96, 512), (384, 512), (384, 1024), (8, 4096))}
LONGEST_IN_PYTORCH = 128  # of those; longer ones take it minutes
TURN_S = 0.5


def python_automaton(x: list[int]) -> list[int]:
    """Predictions for one stream by the online suffix automaton, with the last end written along all suffix links."""
    next_state, link, longest, last_end = [{}], [-1], [0], [-1]
    newest, predicted = 0, []
    for i, symbol in enumerate(x):
        state = len(link)
        next_state.append({})
        link.append(0)
        longest.append(longest[newest] + 1)
        last_end.append(-1)
        at = newest
        while at != -1 and symbol not in next_state[at]:
            next_state[at][symbol] = state
            at = link[at]
        if at != -1:
            there = next_state[at][symbol]
            if longest[there] != longest[at] + 1:
                clone = len(link)
                next_state.append(next_state[there].copy())
                link.append(link[there])
                longest.append(longest[at] + 1)
                last_end.append(last_end[there])
                link[there] = clone
                while at != -1 and next_state[at].get(symbol) == there:
                    next_state[at][symbol] = clone
                    at = link[at]
                there = clone
            link[state] = there
        newest = at = state
        while at > 0 and last_end[at] < 0:
            at = link[at]
        predicted.append(x[last_end[at] + 1] if at > 0 else -1)
        at = newest
        while at > 0:
            last_end[at] = i
            at = link[at]
    return predicted


def kinds(n_streams: int, n_tokens: int) -> dict[str, Tensor]:
    """One-bit streams (S, T)."""
    random = torch.randint(2, (n_streams, n_tokens))
    return {
        "random": random,
        "constant": torch.ones_like(random),
        "3 % ones": (torch.rand(n_streams, n_tokens) < 0.03).long(),
    }


def best(rounds: int, *runs: Callable[[], object]) -> list[float]:
    """The shortest time of each, in seconds."""
    times = [[] for _ in runs]
    for _ in range(rounds):
        for run, taken in zip(runs, times, strict=True):
            turn_ends = time.perf_counter() + TURN_S
            while not taken or time.perf_counter() < turn_ends:
                start = time.perf_counter()
                run()
                taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def rosa_torch() -> Callable[[Tensor], Tensor] | None:
    """The predictions by rosa-torch, a fresh state each time, or None where it is not installed."""
    if importlib.util.find_spec("rosa") is None:
        return None
    from rosa import init_inference_state, prefill

    return lambda x: prefill(init_inference_state(*x.shape), x)


def predictions(x: Tensor, impl: str) -> Tensor:
    """(S, T): the symbol that followed the longest suffix of `x` where it occurred before, or -1."""
    src, _ = rosa(x, x, impl=impl)
    return torch.where(src < 0, -1, x.long().gather(1, src + 1))


def crowd(rounds: int) -> None:
    forms = {
        "cpu": lambda x: predictions(x, "cpu"),
        "dp": lambda x: predictions(x, "dp"),
        "Python": lambda x: torch.tensor([python_automaton(stream) for stream in x.tolist()]),
    }
    if theirs := rosa_torch():
        forms["rosa-torch"] = theirs
    print("{} one-bit streams of length {}, self form: ms, and times the cpu form".format(*CROWD))
    print(f"{'streams':<10}{'cpu':>9}" + "".join(f"{name:>20}" for name in list(forms)[1:]))
    for kind, x in kinds(*CROWD).items():
        answers = [form(x) for form in forms.values()]
        for name, answer in zip(forms, answers, strict=True):
            if not torch.equal(answer, answers[0]):
                raise SystemExit(f"{name} gives other predictions than the cpu form on {kind} streams")
        first, *others = best(rounds, *(lambda form=form, x=x: form(x) for form in forms.values()))
        cells = "".join(f"{1e3 * taken:>11.1f} ({taken / first:>5.1f}x)" for taken in others)
        print(f"{kind:<10}{1e3 * first:>9.1f}{cells}", flush=True)
    if theirs is None:
        print("rosa-torch is not installed")


def growth(rounds: int) -> None:
    print("\nns a token by length, 8 one-bit streams, cpu form; last, times the first")
    print(f"{'streams':<12}" + "".join(f"{n:>9}" for n in LENGTHS))
    for name in kinds(1, 1):
        inputs = [kinds(8, n)[name] for n in LENGTHS]
        times = best(rounds, *(lambda x=x: rosa(x, x, impl="cpu") for x in inputs))
        per_token = [1e9 * taken / x.numel() for taken, x in zip(times, inputs, strict=True)]
        print(f"{name:<12}" + "".join(f"{t:>9.1f}" for t in per_token) + f"   {per_token[-1] / per_token[0]:.2f}x")


def one_by_one() -> None:
    n_streams, n_tokens = CROWD
    x = torch.randint(2, CROWD).to(torch.uint8)
    taken, lengths = [], None
    for n in range(1, n_tokens + 1):
        start = time.perf_counter()
        _, lengths = rosa_last(x[:, :n], x[:, :n], lengths)
        taken.append(time.perf_counter() - start)
    print(f"\none token at a time, {n_streams} one-bit streams")
    for i in (64, 256, 512):
        print(f"  step near token {i:>4}: {1e3 * min(taken[i - 16 : i]):.2f} ms")


def gpu(runs: int = 20) -> None:
    print(f"\n{torch.cuda.get_device_name()}: median ms of {runs} runs, one-bit streams, query and key apart")
    for size in ON_GPU:
        cells = ""
        for kind, x in kinds(*size).items():
            q, k = x.to("cuda", torch.uint8), kinds(*size)[kind].to("cuda", torch.uint8)
            taken = []
            for _ in range(runs + 3):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                rosa(q, k, impl="cuda")
                end.record()
                taken.append((start, end))
            torch.cuda.synchronize()
            cells += f"   {kind} {statistics.median(start.elapsed_time(end) for start, end in taken[3:]):.3f}"
        print(f"{size[0]:>6} x {size[1]:<6}{cells}", flush=True)


def gradients(rounds: int, device: str) -> None:
    name, native = ("CUDA", soft.soft_gradients_cuda) if device == "cuda" else ("C++", soft.soft_gradients_cpu)
    print(f"\nsoft_suffix gradient of {SOFT_BITS}-bit streams, streams x length: ms in {name}")
    for n_streams, n_tokens in SOFT[device]:
        q, k, v = torch.randint(2**SOFT_BITS, (3, n_streams, n_tokens), dtype=torch.uint8, device=device)
        slope, *others = torch.randn(SOFT_BITS + 2, n_streams, n_tokens, device=device).split((SOFT_BITS, 1, 1))
        inputs = (q, k, v, slope.permute(1, 2, 0), others[0][0], others[1][0])
        forms = [partial(native, *inputs)]
        if n_tokens <= LONGEST_IN_PYTORCH:
            forms.append(partial(soft.soft_gradients_torch, *inputs, max_match=None))
        if device == "cuda":
            taken = [median_ms(form, repeats=5, warm_up=1) for form in forms]
        else:
            taken = [1e3 * seconds for seconds in best(rounds, *forms)]
        ratio = f"   PyTorch {taken[1]:>9.1f} ({taken[1] / taken[0]:.0f}x)" if taken[1:] else ""
        print(f"{n_streams:>6} x {n_tokens:<6}{taken[0]:>9.3f}{ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch and of the cpu form (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each form (default 3)")
    parts = ("crowd", "growth", "steps", "gradients", "gpu")
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts, help="what to time (default: all of it)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} threads, best of {args.rounds}\n")
    if "crowd" in args.parts:
        crowd(args.rounds)
    if "growth" in args.parts:
        growth(args.rounds)
    if "steps" in args.parts:
        one_by_one()
    if "gradients" in args.parts:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            gradients(args.rounds, device)
    if "gpu" in args.parts and torch.cuda.is_available():
        gpu()


if __name__ == "__main__":
    main()
