"""One token of some sequences through a whole network in C++, reading every weight once. README.md says how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice
from heron.ops.token_step import cpu
from heron.ops.token_step.network import LayerStates, LayerWeights, LowRank, LowRankGate, Network, Norm

__all__ = [
    "LayerStates",
    "LayerWeights",
    "LowRank",
    "LowRankGate",
    "Network",
    "Norm",
    "TokenStep",
    "token_step_choice",
]


def token_step_choice(device: torch.device, dtype: torch.dtype = torch.float32, head_size: int = 64) -> _choice.Choice:
    """Whether :class:`TokenStep` ("cpu") runs for a network of `dtype` and `head_size` on `device`, or PyTorch does."""
    other = _choice.Choice("reference", f"plain PyTorch; runs on {device.type}")
    return cpu.FORM.choice("C++, each weight read once for all sequences", other, device, dtype, head_size)


class TokenStep:
    """A network of v7 or v8 on a CPU that reads one token of each of some sequences at a time; no gradients.

    :mod:`heron.generation.step` is its definition. What comes out for a sequence is the same, bit for bit, whatever
    others are computed beside it.

    Args:
        network: :class:`Network`, in fp32 or bf16, without low-rank gates; its matrices are copied only where they are
            not contiguous, and its states change in place.

    Raises:
        KernelError: a network that it is not for, states that are not contiguous, no compiler.
    """

    def __init__(self, network: Network):
        self._layers, self._channels = len(network.layers), network.head.shape[1]
        self._n_sequences, (first, *_) = network.states[0].wkv.shape[0], network.layers
        self._gates_width = first.ffn_key.shape[0] if first.deep_embed == "hidden" else self._channels
        self._has_gates = first.deep_embed is not None
        self._prepared = cpu.Prepared(network)

    def __call__(self, sequences: Sequence[int], x: Tensor, gates: Tensor | None = None) -> Tensor:
        """Logits (n, V) in fp32; the states of `sequences` change.

        Args:
            sequences: which n of those that the states are of, all different.
            x: (n, C), their tokens, embedded, the embedding's norm included.
            gates: (L, n, C), or (L, n, F) where they gate the hidden channels: the tokens' DeepEmbed rows of each
                layer; None for a v7.

        Raises:
            KernelError: sequences that are not there or not all different, shapes that do not fit.
        """
        n, last = len(sequences), self._n_sequences - 1
        if not 0 <= min(sequences, default=0) <= max(sequences, default=0) <= last or len(set(sequences)) < n:
            raise KernelError(f"token_step: sequences must be different, 0 to {last}; got {list(sequences)}")
        if tuple(x.shape) != (n, self._channels):
            raise KernelError(f"token_step: x must be {(n, self._channels)}, got {tuple(x.shape)}")
        wanted = (self._layers, n, self._gates_width) if self._has_gates else None
        got = None if gates is None else tuple(gates.shape)
        if got != wanted:
            raise KernelError(f"token_step: gates must be {wanted}, got {got}")
        return cpu.token_step_cpu(self._prepared, sequences, x, gates)
