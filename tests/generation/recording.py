"""What an engine runs on a GPU, on a CPU: steps with what is peculiar to recorded ones, and tokens drawn as there."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from heron.generation import Engine
from heron.generation.drawing import DeviceDraws
from heron.generation.graphed import GraphedDecoder
from heron.model import RWKV
from heron.tables.store import off_device
from heron.tokenizer import Tokenizer

CPU = torch.device("cpu")


class _Recorded:
    """Stands for a CUDA graph: it is replayed."""

    def __init__(self, run: Callable[[], None]):
        self.replay = run


@torch.inference_mode()
def recorded(decoder: GraphedDecoder) -> GraphedDecoder:
    """The decoder; its steps compute their logits into one place each, and spoil those of others to the same place."""

    def replay(mine) -> None:
        for steps in decoder._steps.values():
            i = next(i for of_size in decoder._steps.values() for i, step in enumerate(of_size) if step is mine)
            steps[i].logits.fill_(math.nan)
        mine.logits.copy_(decoder._compute(mine))

    weight = decoder._model.head.weight
    for step in decoder._largest_first():
        step.logits = torch.zeros(step.n, len(weight), dtype=weight.dtype)
        step.graph = _Recorded(lambda step=step: replay(step))
    return decoder


def engine_as_on_a_gpu(
    model: RWKV,
    ids: Tokenizer,
    rows: int,
    fit_steps: bool = True,
    tables: str = "device",
    looks_ahead: bool = True,
) -> Engine:
    """An engine whose steps are those of a GPU, as if recorded, and whose tokens are drawn as there."""
    engine, moved = Engine(model, ids, rows, tables=tables), None
    if tables != "device":
        model, moved = off_device(model, CPU, None)
    decoder = recorded(GraphedDecoder(model, rows, moved, fit_steps=fit_steps))
    if not looks_ahead:
        decoder.look_ahead = lambda *_: None
    engine._decoder, engine._draws = decoder, DeviceDraws(ids, rows, CPU)
    return engine
