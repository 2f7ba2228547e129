"""The samples of a step that was bad, kept for whoever wants to know why."""

from __future__ import annotations

from pathlib import Path

import torch

from heron import files
from heron.checkpoint.formats import safetensors
from heron.dist import Ranks
from heron.train.parts import Gradients


def keep(out: Path, step: int, gradients: Gradients, ranks: Ranks, context_parallel: int) -> Path:
    """Write tokens and targets of all processes, each sample once, to a file in a run folder; gives the file."""
    path = out / "bad" / f"step-{step:08d}-sample-{gradients.first}.safetensors"
    halves = list(zip(*gradients.samples, strict=True))[:2]
    mine = [torch.cat(half) for half in halves]  # pyright: ignore[reportArgumentType, reportCallIssue]
    tokens, targets = (torch.cat(ranks.gathered(half)[::context_parallel]) for half in mine)

    def write() -> None:
        with files.new_file(path) as temporary:
            safetensors.write({"tokens": tokens, "targets": targets}, temporary)

    ranks.first(write)
    return path
