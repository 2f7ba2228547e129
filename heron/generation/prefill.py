"""Prompts are read in parallel, a piece at a time: the memory is that of one piece, however long the prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heron.generation.decoder import is_fusible, only_computing
from heron.generation.graphed import GraphedReader
from heron.generation.sending import sent
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
        most_packed: pieces of several prompts that may be read in one pass, at most `size` tokens together. Above 1 for
            models alone whose states keep their size, without a ROSA memory.
    """

    def __init__(
        self,
        model: RWKV,
        device: torch.device,
        size: int,
        tables: Tables | None,
        documents: Documents | None = None,
        most_packed: int = 1,
    ):
        self.size, self._most_packed = size, most_packed
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

    def packable(self, lengths: Sequence[int]) -> list[int]:
        """Which of the pieces that wait, of so many tokens each, are read in one pass: the first, and what fits in
        behind it."""
        taken, n = [0], lengths[0]
        for number, length in enumerate(lengths[1:], 1):
            if len(taken) == self._most_packed or n == self.size:
                break
            if n + length <= self.size:
                taken.append(number)
                n += length
        return taken

    def read_packed(self, pieces: Sequence[Sequence[int]], states: Sequence[State | None]) -> list[State | None]:
        """The state behind each of several pieces, which have a state each; they are read in one pass.

        What a piece comes to may depend on its neighbours by the rounding of products. The states are views of one.
        """
        if len(pieces) == 1:
            return [self.read(pieces[0], states[0])]
        before = None
        if any(state is not None for state in states):
            zeros = State.zeros(self._model.config, 1, self._device, self._model.emb.weight.dtype)
            before = State.joined([zeros if state is None else state for state in states])
        offsets = sent([0, *itertools.accumulate(map(len, pieces))], self._device)
        with only_computing(self._model):
            tokens = self._tokens(list(itertools.chain(*pieces)))
            behind = with_memory(self._model.hidden_states(tokens, before, offsets)[1], None)
        return [behind and behind.map(lambda part, i=i: part[i : i + 1]) for i in range(len(pieces))]

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
        tokens = sent([list(ids)], self._device)
        if self._tables is not None:
            self._tables.fetch(tokens, self._device)
        return tokens
