"""Prompts are read in parallel, a piece at a time: the memory is that of one piece, however long the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heron.generation.decoder import is_fusible, only_computing
from heron.generation.graphed import GraphedReader
from heron.model import RWKV, State
from heron.model.memory import Documents, Recollection, recall
from heron.model.state import with_memory
from heron.tables.store import Tables


class PromptReader:
    """Reads pieces of prompts with a model, each from the state behind the one before.

    Args:
        model: an RWKV, on `device`.
        size: tokens of a piece, but for the last one of a prompt; on a GPU pieces of just this length are read by a
            CUDA graph.
        tables: DeepEmbed tables off the device; None: the model has its own.
        documents: what a ROSA memory looks into beside each prompt.
    """

    def __init__(
        self,
        model: RWKV,
        device: torch.device,
        size: int,
        tables: Tables | None,
        documents: Documents | None = None,
    ):
        self.size = size
        self._model, self._device, self._tables, self._documents = model, device, tables, documents
        self._rosa = getattr(model.config, "memory", None)
        self._has_graph = device.type == "cuda" and tables is None and is_fusible(model)
        self._graphed: GraphedReader | None = None

    def read(self, piece: Sequence[int], state: State | None) -> State | None:
        """The state behind a piece, in inference mode; `state` (batch size 1; None: zeros) is kept."""
        if self._has_graph and len(piece) == self.size:
            recalled, memory = self._recall(piece, state)
            if self._graphed is None:
                self._graphed = GraphedReader(self._model, self.size)
            return with_memory(self._graphed.read(piece, state, recalled), memory)
        return self.hidden(piece, state)[1]

    def hidden(self, piece: Sequence[int], state: State | None) -> tuple[Tensor, State | None]:
        """The last hidden states (T, C) of a piece, behind ln_out, and the state as :meth:`read` gives it."""
        recalled, memory = self._recall(piece, state)
        of_memory: dict[str, Any] = {} if recalled is None else {"recalled": recalled}
        with only_computing(self._model):
            hidden, behind = self._model.hidden_states(self._tokens(piece), state, **of_memory)
        return hidden[0], with_memory(behind, memory)

    def logits(self, token: int, state: State | None) -> Tensor:
        """Those (V,) behind one token more."""
        recalled, _ = self._recall([token], state)
        of_memory = {} if recalled is None else {"recalled": recalled}
        with only_computing(self._model):
            return self._model(self._tokens([token]), state, **of_memory)[0][0, -1]

    def _recall(
        self, piece: Sequence[int], state: State | None
    ) -> tuple[Tensor | None, tuple[Recollection, ...] | None]:
        """What ROSA memory finds for a piece, (1, n, K, 2), and the memory behind it; None and None: there is none."""
        if self._rosa is None:
            return None, None
        before = (state and state.memory) or (Recollection(),)
        if self._rosa.window is not None:  # so that the piece can be read again where this is interrupted
            before = tuple(memory.clone() for memory in before)
        ids = torch.tensor([list(piece)], device=self._device)
        return recall(ids, before, self._rosa, documents=self._documents)

    def _tokens(self, ids: Sequence[int]) -> Tensor:
        """ids as a batch (1, T) on the device; their rows of tables off the device are fetched."""
        tokens = torch.tensor([list(ids)], device=self._device)
        if self._tables is not None:
            self._tables.fetch(tokens, self._device)
        return tokens
