"""The memory of each GPU by size of the model and number of GPUs, computed. ``python benchmarks/what_fits.py``

Prints a table in Markdown, by ``heron estimate``, on any machine: GiB at most at once on each GPU, for bf16, one sample
of --ctx_len a GPU, blocks recomputed. One GPU has all weights; several share them by --parallel. What allocators round
up and CUDA itself takes, some GiB, comes on top.
"""

from __future__ import annotations

import argparse

from heron import ModelConfig, TrainConfig
from heron.commands.estimate import estimate, on_gpus


def most_at_once(size: str, gpus: int, options: argparse.Namespace) -> float:
    """GiB on each of so many GPUs."""
    model = ModelConfig.preset(f"{options.family}-{size}")
    parallel = options.parallel if gpus > 1 else "auto"
    tables = "host" if model.deep_embed is not None else "device"
    config = TrainConfig(
        model=model, micro_bsz=1, ctx_len=options.ctx_len, max_steps=1, dtype="bf16", weights="bf16",
        grad_checkpoint=True, parallel=parallel, tables=tables,
    )  # fmt: skip
    return estimate(on_gpus(config, model, gpus), model).peak / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="rwkv7", help="of presets: rwkv7, rwkv8 (tables on the host)")
    parser.add_argument("--sizes", nargs="+", default=["0.4b", "1.5b", "2.9b", "7.2b", "13.3b"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 8, 64, 512])
    parser.add_argument("--parallel", default="fsdp", choices=("ddp", "fsdp", "hsdp"))
    parser.add_argument("--ctx_len", type=int, default=4096)
    options = parser.parse_args()
    print(f"| {options.family} | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in options.gpus) + " |")
    print("|---" * (1 + len(options.gpus)) + "|")
    for size in options.sizes:
        cells = [f"{most_at_once(size, gpus, options):.1f}" for gpus in options.gpus]
        print(f"| {size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
