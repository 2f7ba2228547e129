"""The definition of token_step, in PyTorch on any device, made of the definitions of its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from heron.ops.head_step.reference import HeadInputs, HeadWeights, head_step_reference
from heron.ops.norm_mix.reference import norm_mix_reference


class Norm(NamedTuple):
    """A layer norm over channels: weight and bias (C,)."""

    weight: Tensor
    bias: Tensor
    eps: float


class LowRank(NamedTuple):
    """One of the time mix's products of two matrices; a bias of None is 0."""

    down: Tensor
    """(rank, C)."""
    up: Tensor
    """(C, rank)."""
    bias: Tensor | None
    """(C,)."""


class LayerWeights(NamedTuple):
    """A block. Matrices are (out, in), as nn.Linear has them; F is the number of hidden channels."""

    norm1: Norm
    mix: Tensor
    """(6, C), of the inputs of r, decay, k, v, iclr and gate."""
    receptance: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    values_gate: LowRank
    decay: LowRank
    iclr: LowRank
    gate: LowRank
    head: HeadWeights
    norm2: Norm
    channel_mix: Tensor
    """(1, C)."""
    ffn_key: Tensor
    """(F, C)."""
    ffn_value: Tensor
    """(C, F)."""


class LayerMemory(NamedTuple):
    """What a block remembers of all sequences; changes in place."""

    att_shift: Tensor
    """(all, C)."""
    wkv: Tensor
    """(all, H, N_value, N_key), fp32 (fp64 for fp64)."""
    ffn_shift: Tensor
    """(all, C)."""


class Network(NamedTuple):
    """Weights and memories of a network, all of one dtype but for wkv, on one device."""

    layers: Sequence[LayerWeights]
    memories: Sequence[LayerMemory]
    norm: Norm
    head: Tensor
    """(V, C)."""
    gates_hidden: bool = False
    """Whether DeepEmbed's rows gate the channel mix's hidden channels rather than its output."""


def token_step_reference(network: Network, rows: Sequence[int], x: Tensor, gates: Tensor | None) -> Tensor:
    """The definition; see :func:`heron.ops.token_step`."""
    rows, v_first = torch.tensor(rows, device=x.device), None
    for number, (layer, memory) in enumerate(zip(network.layers, network.memories, strict=True)):
        att_shift, wkv, ffn_shift = (part[rows] for part in memory)
        x, v_first = _time_mix(layer, x, att_shift, wkv, v_first)
        of_table = None if gates is None else gates[number].to(x.dtype)
        x = _channel_mix(layer, x, ffn_shift, of_table, network.gates_hidden)
        for part, new in zip(memory, (att_shift, wkv, ffn_shift), strict=True):
            part[rows] = new
    norm = network.norm
    logits = F.linear(F.layer_norm(x, x.shape[1:], norm.weight, norm.bias, norm.eps), network.head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _time_mix(
    layer: LayerWeights, x: Tensor, shift: Tensor, wkv: Tensor, v_first: Tensor | None
) -> tuple[Tensor, Tensor]:
    x_r, x_w, x_k, x_v, x_a, x_g = norm_mix_reference(x, *layer.norm1, layer.mix, shift).unbind()
    r, k, v = F.linear(x_r, layer.receptance), F.linear(x_k, layer.key), F.linear(x_v, layer.value)
    w = _low_rank(layer.decay, x_w, torch.tanh)
    iclr, gate = _low_rank(layer.iclr, x_a), _low_rank(layer.gate, x_g, torch.sigmoid)
    of_values = (None, None) if v_first is None else (_low_rank(layer.values_gate, x_v), v_first)
    y = head_step_reference(HeadInputs(r, w, k, v, iclr, gate, *of_values), layer.head, wkv)
    return x + F.linear(y, layer.output), v if v_first is None else v_first


def _low_rank(part: LowRank, x: Tensor, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    squeezed = F.linear(x, part.down)
    return F.linear(squeezed if activation is None else activation(squeezed), part.up, part.bias)


def _channel_mix(layer: LayerWeights, x: Tensor, shift: Tensor, gates: Tensor | None, gates_hidden: bool) -> Tensor:
    (mixed,) = norm_mix_reference(x, *layer.norm2, layer.channel_mix, shift).unbind()
    hidden = torch.relu(F.linear(mixed, layer.ffn_key)).square()
    if gates is None:
        return x + F.linear(hidden, layer.ffn_value)
    if gates_hidden:
        return x + F.linear(hidden * gates, layer.ffn_value)
    return x + F.linear(hidden, layer.ffn_value) * gates
