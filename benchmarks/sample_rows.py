"""heron.ops.sample_rows on this GPU: the time to draw one token for each of many rows of logits.

python benchmarks/sample_rows.py [--rows 256] [--vocab 65536] [--dtypes bfloat16]

The kernel draws 20 times in a recorded graph, so its time is the GPU's alone; PyTorch's form is timed call by call.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from timing import median_ms, need_gpu
from torch import Tensor

from heron.generation.graphed import recorded
from heron.ops import sample_rows

SETTINGS = {  # temperature, top_p, top_k, presence_penalty, frequency_penalty
    "greedy": (0, 1, 0, 0, 0),
    "temperature 1": (1, 1, 0, 0, 0),
    "top_p 0.5": (1, 0.5, 0, 0, 0),
    "top_p 0.95": (0.8, 0.95, 0, 0, 0),
    "top_k 50": (1, 1, 50, 0, 0),
    "top_p 0.5, penalties": (1, 0.5, 0, 0.3, 0.3),
}
DTYPES = ["float16", "bfloat16", "float32"]
DRAWS = 20  # in a graph


def likely_few(n: int, vocab: int, device: torch.device) -> Tensor:
    """Logits as a trained model has them: 200 tokens that may come, and the rest far away."""
    logits = 1.5 * torch.randn(n, vocab, device=device) - 12
    logits[:, :200] += 8 + 2 * torch.randn_like(logits[:, :200])
    return logits


LOGITS: dict[str, Callable[[int, int, torch.device], Tensor]] = {
    "spread 0.3": lambda n, vocab, device: 0.3 * torch.randn(n, vocab, device=device),
    "spread 2.5": lambda n, vocab, device: 2.5 * torch.randn(n, vocab, device=device),
    "likely few": likely_few,
    "all equal": lambda n, vocab, device: torch.zeros(n, vocab, device=device),
}


def draw_often(draw: Callable[[], object]) -> None:
    for _ in range(DRAWS):
        draw()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    arguments = parser.parse_args()
    need_gpu(parser)
    n, vocab, device = arguments.rows, arguments.vocab, torch.device("cuda")
    torch.manual_seed(0)
    uniforms = torch.rand(n, dtype=torch.float64, device=device)
    barred = torch.zeros(vocab, dtype=torch.bool, device=device)
    counts = (torch.rand(n, vocab, device=device) < 0.01).float()
    print(f"{n} rows of {vocab} on {torch.cuda.get_device_name()}: microseconds")
    for dtype in arguments.dtypes:
        for kind, make in LOGITS.items():
            logits = make(n, vocab, device).to(getattr(torch, dtype))
            for name, numbers in SETTINGS.items():
                settings = torch.tensor([numbers], dtype=torch.float64, device=device).repeat(n, 1)
                of_row = counts if numbers[3] else None
                draw = functools.partial(sample_rows, logits, of_row, barred, settings, uniforms)
                graph = recorded(functools.partial(draw_often, functools.partial(draw, impl="cuda")))
                kernel = median_ms(graph.replay, 10) * 1000 / DRAWS
                pytorch = median_ms(functools.partial(draw, impl="reference"), 5, warm_up=1) * 1000
                print(f"{dtype:9} {kind:11} {name:21} kernel {kernel:6.1f}  PyTorch {pytorch:7.0f}", flush=True)


if __name__ == "__main__":
    main()
