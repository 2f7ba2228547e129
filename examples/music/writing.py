"""How a model writes: it reads what is there in one pass (GPT mode), then adds bar after bar, id by id (RNN mode)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from core.rwkv_training.rwkv_v8_model import RWKV_x070
from examples.music import command
from examples.music.vocabulary import Vocabulary, joined
from heron.commands import flag_values
from heron.errors import CheckpointError
from heron.generation import Sampling, sample

LONGEST_BAR = 200  # ids


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what writes, how much, and how."""
    parser.add_argument("--model", type=Path, default=Path("runs/music"), help="a run folder, or a .pth file")
    parser.add_argument("--bars", type=command.at_least(1), default=8, help="bars that are written")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--seed", type=flag_values.seed, default=0)


def load(path: Path, vocabulary: Vocabulary) -> RWKV_x070:
    """The model of a run folder, or of a .pth file.

    Raises:
        CheckpointError: there is none, or it is of another vocabulary.
    """
    file = path / "rwkv-final.pth" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; python -m examples.music.train makes a model")
    model = RWKV_x070(SimpleNamespace(MODEL_NAME=file.with_suffix("")))
    if model.config.vocab_size != vocabulary.size:
        raise CheckpointError(f"{file}: wanted a model of {vocabulary.size} ids, got one of {model.config.vocab_size}")
    return model


def bars(
    model: RWKV_x070, vocabulary: Vocabulary, given: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int
) -> Iterator[list[int]]:
    """The next `n` bars behind the bars `given`, each as soon as the model begins another one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logits, state = model.forward_seq([*joined(given), vocabulary.bar], None)
        for _ in range(n):
            bar = [vocabulary.bar]
            while len(bar) < LONGEST_BAR:
                logits[vocabulary.end] = -math.inf  # the piece goes on as long as bars are wanted
                drawn = sample(logits, sampling, None, generator)
                if drawn == vocabulary.bar:
                    break
                bar.append(drawn)
                logits, state = model.forward_one(drawn, state)
            yield bar
            logits, state = model.forward_one(vocabulary.bar, state)
