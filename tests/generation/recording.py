"""Steps of a GraphedDecoder on a CPU, with what is peculiar to those that are recorded as CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from heron.generation.graphed import GraphedDecoder


class _Recorded:
    """Stands for a CUDA graph: it is replayed."""

    def __init__(self, run: Callable[[], None]):
        self.replay = run


@torch.inference_mode()
def recorded(decoder: GraphedDecoder) -> GraphedDecoder:
    """The decoder; its steps compute their logits into one place, and spoil those of the other sizes."""

    def replay(mine) -> None:
        for size in decoder._sizes.values():
            size.logits.fill_(math.nan)
        mine.logits.copy_(decoder._compute(mine))

    weight = decoder._model.head.weight
    for size in decoder._sizes.values():
        size.logits = torch.zeros(size.n, len(weight), dtype=weight.dtype)
        size.graph = _Recorded(lambda size=size: replay(size))
    return decoder
