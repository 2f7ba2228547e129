"""Prompts are read in parallel, a piece at a time: the memory is that of one piece, however long the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heron.generation.decoder import is_fusible, only_computing
from heron.generation.graphed import GraphedReader
from heron.model import RWKV, State
from heron.tables.store import Tables


class PromptReader:
    """Reads pieces of prompts with a model, each from the state behind the one before.

    Args:
        model: an RWKV, on `device`.
        size: tokens of a piece, but for the last one of a prompt; on a GPU pieces of just this length are read by a
            CUDA graph.
        tables: DeepEmbed tables off the device; None: the model has its own.
    """

    def __init__(self, model: RWKV, device: torch.device, size: int, tables: Tables | None):
        self.size = size
        self._model, self._device, self._tables = model, device, tables
        self._has_graph = device.type == "cuda" and tables is None and is_fusible(model)
        self._graphed: GraphedReader | None = None

    def read(self, piece: Sequence[int], state: State | None) -> State | None:
        """The state behind a piece, in inference mode; `state` (batch size 1; None: zeros) is kept."""
        if self._has_graph and len(piece) == self.size:
            if self._graphed is None:
                self._graphed = GraphedReader(self._model, self.size)
            return self._graphed.read(piece, state)
        with only_computing(self._model):
            return self._model.hidden_states(self._tokens(piece), state)[1]  # pyright: ignore[reportReturnType]

    def logits(self, token: int, state: State | None) -> Tensor:
        """Those (V,) behind one token more."""
        with only_computing(self._model):
            return self._model(self._tokens([token]), state)[0][0, -1]

    def _tokens(self, ids: Sequence[int]) -> Tensor:
        """ids as a batch (1, T) on the device; their rows of tables off the device are fetched."""
        tokens = torch.tensor([list(ids)], device=self._device)
        if self._tables is not None:
            self._tables.fetch(tokens, self._device)
        return tokens
