"""One token of some sequences through a whole network in C++, reading every weight once. README.md says how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice
from heron.ops.token_step import cpu, cuda
from heron.ops.token_step.network import LayerStates, LayerWeights, LowRank, LowRankGate, Memory, Network, Norm

__all__ = [
    "LayerStates",
    "LayerWeights",
    "LowRank",
    "LowRankGate",
    "Memory",
    "Network",
    "Norm",
    "OneLaunch",
    "TokenStep",
    "one_launch_choice",
    "token_step_choice",
]


def token_step_choice(device: torch.device, dtype: torch.dtype = torch.float32, head_size: int = 64) -> _choice.Choice:
    """Whether :class:`TokenStep` ("cpu") runs for a network of `dtype` and `head_size` on `device`, or PyTorch does."""
    other = _choice.Choice("reference", f"plain PyTorch; runs on {device.type}")
    return cpu.FORM.choice("C++, each weight read once for all sequences", other, device, dtype, head_size)


def one_launch_choice(device: torch.device, network: Network | None = None) -> _choice.Choice:
    """Whether :class:`OneLaunch` ("cuda") runs for `network` on `device`, or its pieces do, kernel by kernel.

    None: for any network that it is for.
    """
    other = _choice.Choice("reference", f"piece by piece; runs on {device.type}")
    return cuda.FORM.choice("one kernel, which asks for weights ahead of every wait", other, device, network)


class OneLaunch:
    """A network of v7 or v8 on a GPU that reads one token of one sequence in one launch; no gradients.

    :mod:`heron.generation.step` is its definition.

    Args:
        network: :class:`Network`, without low-rank gates; its low-rank matrices contiguous, of ranks that are multiples
            of 8. A step writes its states.
        before: the states that a step goes on from; they stay as they are, but for those that are the network's own.

    Raises:
        KernelError: a network that it is not for, no nvcc.
    """

    def __init__(self, network: Network, before: Sequence[LayerStates]):
        cuda.FORM.require(network.norm.weight.device, network)
        self._prepared = cuda.Prepared(network, before)

    def __call__(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """Logits (1, V), in the dtype of x.

        Args:
            x: (1, C), the token, embedded, the embedding's norm included.
            gates: (L, C), or (L, F) where they gate the hidden channels: the token's DeepEmbed rows; None for a v7.
        """
        return self._prepared(x, gates)


class TokenStep:
    """A network of v7 or v8 on a CPU that reads one token of each of some sequences at a time; no gradients.

    Its definition is :mod:`heron.generation.step`, between the embedding and the head, with what
    :class:`heron.model.memory.RosaMemory` adds to both. What comes out for a sequence is the same, bit for bit,
    whatever others are computed beside it.

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
        self._n_matches = 0 if network.memory is None else len(network.memory.scale)
        self._prepared = cpu.Prepared(network)

    def __call__(
        self,
        sequences: Sequence[int],
        tokens: Sequence[int],
        gates: Tensor | None = None,
        recalled: Tensor | None = None,
    ) -> Tensor:
        """Logits (n, V) in fp32; the states of `sequences` change.

        Args:
            sequences: which n of those that the states are of, all different.
            tokens: the n ids that they read.
            gates: (L, n, C), or (L, n, F) where they gate the hidden channels: the tokens' DeepEmbed rows of each
                layer; None for a v7.
            recalled: (n, K, 2) int64, what ROSA memory found for the tokens; None for a network without.

        Raises:
            KernelError: sequences that are not there or not all different, shapes that do not fit, ids or lengths of
                matches out of range.
        """
        n, last = len(sequences), self._n_sequences - 1
        if not 0 <= min(sequences, default=0) <= max(sequences, default=0) <= last or len(set(sequences)) < n:
            raise KernelError(f"token_step: sequences must be different, 0 to {last}; got {list(sequences)}")
        if len(tokens) != n:
            raise KernelError(f"token_step: tokens must be {n}, one for each sequence, got {len(tokens)}")
        wanted = (self._layers, n, self._gates_width) if self._has_gates else None
        got = None if gates is None else tuple(gates.shape)
        if got != wanted:
            raise KernelError(f"token_step: gates must be {wanted}, got {got}")
        wanted = (n, self._n_matches, 2) if self._n_matches else None
        got = None if recalled is None else tuple(recalled.shape)
        if got != wanted:
            raise KernelError(f"token_step: recalled must be {wanted}, got {got}")
        return cpu.token_step_cpu(self._prepared, sequences, tokens, gates, recalled)
