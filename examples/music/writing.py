"""How a model writes: it reads what is there in one pass (GPT mode), then adds bar after bar, id by id (RNN mode)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from core.rwkv_training.rwkv_v8_model import RWKV_x070
from examples.music.scores import Vocabulary
from heron.generation import Sampling, sample

LONGEST_BAR = 200  # ids


def load(path: Path) -> RWKV_x070:
    """The model of a run folder, or of a .pth file."""
    path = path / "rwkv-final.pth" if path.is_dir() else path
    return RWKV_x070(SimpleNamespace(MODEL_NAME=path.with_suffix("")))


def bars(
    model: RWKV_x070, vocabulary: Vocabulary, before: Sequence[int], n: int, sampling: Sampling, seed: int
) -> Iterator[list[int]]:
    """The next `n` bars behind the whole bars `before`, each as soon as the model begins another one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logits, state = model.forward_seq([*before, vocabulary.bar], None)
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
