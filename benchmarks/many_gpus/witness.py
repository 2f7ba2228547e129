"""A run of `heron train` of which is noted what it began and ended with and which samples it read.

``python -m benchmarks.many_gpus.witness CONFIG NOTES [--dies_behind STEP]``, alone or under torchrun. Each process
writes into a file of its own in the folder NOTES. With --dies_behind the last process kills itself once that step's
checkpoint is whole and the steps have gone on; but not when torchrun has started it anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import heron
from heron import dist
from heron.checkpoint import run
from heron.errors import HeronError
from heron.train.parts import Parts, Progress
from heron.train.step import Learner

_PATIENCE_S = 120.0


class Witness(heron.Trainer):
    """A trainer that notes."""

    def __init__(self, config: heron.TrainConfig, notes: Path, dies_behind: int | None):
        super().__init__(config)
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        notes.mkdir(parents=True, exist_ok=True)
        self._file = notes / f"{restart}-{self.ranks.rank}.jsonl"
        self._dies_behind = dies_behind if restart == "0" and self.ranks.rank == self.ranks.count - 1 else None

    def _loop(self, parts: Parts, progress: Progress) -> str:
        self._note(step=progress.step, holds=digest(parts.learner))
        status = super()._loop(parts, progress)
        self._note(step=progress.step, holds=digest(parts.learner))
        return status

    def _gradients(self, parts: Parts, first: int) -> Any:
        if self._dies_behind is not None and first > self._dies_behind * self.config.samples_per_step:
            self._die(self.out / "checkpoints" / f"step-{self._dies_behind:08d}")
        gradients = super()._gradients(parts, first)
        read = [
            _sha256(pair) for tokens, targets, *_ in gradients.samples for pair in zip(tokens, targets, strict=True)
        ]
        self._note(first=first, read=read)
        return gradients

    def _die(self, checkpoint: Path) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not checkpoint.exists():
            if time.monotonic() > deadline:
                raise HeronError(f"{checkpoint.name}: not there {_PATIENCE_S:.0f} s behind its step")
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, **what: object) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")


def digest(learner: Learner) -> str:
    """sha256 of all weights and moments, the same however they lie over processes. All processes call it together."""
    held = run.contents(0, learner.trained, learner.optimizer, {}, "")
    sums = {
        f"{file} {name}": _sha256([tensor])
        for file in (run.MODEL, run.OPTIMIZER)
        for name, tensor in dist.whole(held.tensors[file])
    }
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _sha256(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("notes", type=Path)
    parser.add_argument("--dies_behind", type=int, metavar="STEP")
    options = parser.parse_args(arguments)
    try:
        status = Witness(heron.TrainConfig.from_yaml(options.config), options.notes, options.dies_behind).fit()
    except HeronError as error:
        print(f"heron: {error}", file=sys.stderr)
        return 1
    return 0 if status == "finished" else 1


if __name__ == "__main__":
    sys.exit(main())
