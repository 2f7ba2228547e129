"""heron.ops.sample_rows on this GPU: the time to draw one token for each of many rows of logits.

python benchmarks/sample_rows.py [--rows 256] [--vocab 65536]
"""

from __future__ import annotations

import argparse
import functools

import torch
from timing import median_ms, need_gpu

from heron.ops import sample_rows

SETTINGS = {  # temperature, top_p, top_k, presence_penalty, frequency_penalty
    "greedy": (0, 1, 0, 0, 0),
    "temperature 1": (1, 1, 0, 0, 0),
    "top_p 0.5": (1, 0.5, 0, 0, 0),
    "top_p 0.95": (0.8, 0.95, 0, 0, 0),
    "top_k 50": (1, 1, 50, 0, 0),
    "top_p 0.5, penalties": (1, 0.5, 0, 0.3, 0.3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=65536)
    arguments = parser.parse_args()
    need_gpu(parser)
    n, vocab, device = arguments.rows, arguments.vocab, torch.device("cuda")
    torch.manual_seed(0)
    uniforms = torch.rand(n, dtype=torch.float64, device=device)
    barred = torch.zeros(vocab, dtype=torch.bool, device=device)
    counts = (torch.rand(n, vocab, device=device) < 0.01).float()
    print(f"{n} rows of {vocab} on {torch.cuda.get_device_name()}: milliseconds")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for spread in (0.3, 2.5):
            logits = (spread * torch.randn(n, vocab, device=device)).to(dtype)
            for name, numbers in SETTINGS.items():
                settings = torch.tensor([numbers], dtype=torch.float64, device=device).repeat(n, 1)
                of_row = counts if numbers[3] else None
                draw = functools.partial(sample_rows, logits, of_row, barred, settings, uniforms)
                took = {
                    impl: median_ms(functools.partial(draw, impl=impl), 20, warm_up=5) for impl in ("cuda", "reference")
                }
                print(
                    f"{str(dtype)[6:]:9} spread {spread}  {name:21} kernel {took['cuda']:.3f}  "
                    f"PyTorch {took['reference']:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
