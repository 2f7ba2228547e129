"""The weights and states of a network as a step over one token reads them: in C++, and in PyTorch on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple

from torch import Tensor

from heron.ops.codes import Matrix
from heron.ops.head_step.reference import HeadWeights


class Norm(NamedTuple):
    """A layer norm over channels: weight and bias (C,)."""

    weight: Tensor
    bias: Tensor
    eps: float


class LowRank(NamedTuple):
    """A product of two matrices."""

    down: Tensor
    """(rank, C)."""
    up: Tensor
    """(C, rank)."""


class LowRankGate(NamedTuple):
    """What v7a gates its hidden channels by, beside a table's row of 32 x 32 numbers."""

    s0: Tensor
    """(F,)."""
    s1: Tensor
    """(C, 32)."""
    s2: Tensor
    """(32, F)."""
    of_embedding: Tensor
    """(1024, C): what it makes of the embedded token is added to the table's row."""


class LayerWeights(NamedTuple, Generic[Matrix]):
    """A block. Matrices are (out, in), as nn.Linear has them; F is the number of hidden channels."""

    norm1: Norm
    mix: Tensor
    """(6, C), of the inputs of r, k, v, decay, iclr and gate."""
    receptance: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    low_rank: Sequence[LowRank]
    """Of the values' gate, decay, iclr and gate; or one that holds all four, (4, rank, C) and (4, C, rank)."""
    head: HeadWeights
    norm2: Norm
    channel_mix: Tensor
    """(1, C)."""
    ffn_key: Matrix
    """(F, C)."""
    ffn_value: Matrix
    """(C, F)."""
    deep_embed: str | None
    """What DeepEmbed's rows gate: the channel mix's "output" or its "hidden" channels, these also by "low-rank"."""
    low_rank_gate: LowRankGate | None
    """Where `deep_embed` is "low-rank"."""
    joined: Tensor | None = None
    """(3, C, C): `receptance`, `key` and `value` once more; None: not joined."""


class LayerStates(NamedTuple):
    """The states of all sequences in one block; they change in place."""

    att_shift: Tensor
    """(sequences, C)."""
    wkv: Tensor
    """(sequences, H, N_value, N_key), fp32 (fp64 for fp64)."""
    ffn_shift: Tensor
    """(sequences, C)."""


class Memory(NamedTuple):
    """ROSA memory: what each of K matches of a token adds, as :class:`heron.model.memory.RosaMemory` says.

    At the input ``embedding[predicted] * scale[k] + length[k, row]``, to the logit of the predicted token
    ``copy[k, row]``; R is the number of rows.
    """

    scale: Tensor
    """(K, C)."""
    length: Tensor
    """(K, R, C)."""
    copy: Tensor
    """(K, R)."""
    rows: Tensor
    """(max_match + 1,) integers: of each length the row, from 1 on; 0 of a length of 0, where nothing is added."""


class Network(NamedTuple, Generic[Matrix]):
    """Weights and states of a network, all of one dtype but for wkv and matrices of codes, on one device."""

    embedding: Tensor
    """(V, C)."""
    first_norm: Norm
    """Of the embedded tokens."""
    layers: Sequence[LayerWeights[Matrix]]
    states: Sequence[LayerStates]
    norm: Norm
    head: Matrix
    """(V, C)."""
    memory: Memory | None
