"""What ROSA memory of each of several sequences has read, beside the states of a decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heron.config import RosaConfig
from heron.model import State
from heron.model.memory import Documents, Match, Recollection
from heron.ops.rosa.device_stream import DeviceStream


class SequenceMemories:
    """The memories of n sequences.

    Args:
        rosa: the rules, ModelConfig.memory.
        n: number of sequences.
        documents: what all look into as well.

    Attributes:
        longest: the longest match of each sequence of the last :meth:`step`; None before it.
    """

    def __init__(self, rosa: RosaConfig, n: int, documents: Documents | None = None):
        self._rosa, self._documents = rosa, documents
        self._of = [Recollection()] * n
        self.longest: list[Match] | None = None

    def write(self, sequence: int, state: State | None) -> None:
        """Let `sequence` go on from the memory in `state` (batch size 1; None: nothing was read), in its stream."""
        self._of[sequence] = state.memory[0] if state is not None and state.memory else Recollection()

    def read(self, sequence: int) -> tuple[Recollection]:
        """The memory of `sequence`, which stays right when that goes on."""
        memory = self._of[sequence]
        return (memory if self._rosa.window is None else memory.clone(),)  # a window overwrites old tokens

    def on_device(self, sequence: int, device: torch.device) -> DeviceStream:
        """What `sequence` has read, as a copy on a CUDA device that reads on by itself, in the sequence alone."""
        return self._of[sequence].on_device(self._rosa, device)

    def step(self, sequences: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Read `tokens`, one for each of `sequences`; recalled (n, K, 2), on the host."""
        found = []
        for sequence, token in zip(sequences, tokens, strict=True):
            matches, self._of[sequence] = self._of[sequence].read_one(token, self._rosa, self._documents)
            found.append(matches)
        self.longest = [matches[0] for matches in found]
        return torch.tensor([[match[:2] for match in matches] for matches in found])
