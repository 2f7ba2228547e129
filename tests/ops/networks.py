"""Random networks for the tests of heron.ops.token_step, and what a step of them is by its definition."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from heron.generation.step import PLAIN, channel_mix, time_mix
from heron.ops.codes import CodedMatrix
from heron.ops.head_step import HeadWeights
from heron.ops.token_step import LayerStates, LayerWeights, LowRank, Memory, Network, Norm

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
LENGTHS = [*range(17), *(17,) * 4]  # the row of each length of a match, up to 20


def network(C, head_size, hidden, ranks, vocab, layers=3, sequences=7, dtype=FP64, seed=0, gates=None, matches=0):
    """Random weights, rounded to bf16 so that they are the same in every dtype, and states."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0, shift=0.0, of=dtype):
        return (scale * torch.randn(*size, generator=generator, dtype=FP64) + shift).to(BF16).to(of)

    def matrix(out, n_in):
        return normal(out, n_in, scale=n_in**-0.5)

    def norm():
        return Norm(normal(C, scale=0.3, shift=1), normal(C, scale=0.3), 1e-5)

    def low_rank(rank):
        return LowRank(matrix(rank, C), matrix(C, rank))

    def layer(number):
        *of_head, v0 = (normal(C, scale=0.5, shift=1) for _ in range(8))
        of_head[4] = of_head[4].view(C // head_size, head_size)
        head = HeadWeights(*of_head, 64e-5, v0 if number else None)
        return LayerWeights(
            norm(), normal(6, C, scale=0.3, shift=0.5), *(matrix(C, C) for _ in range(4)), list(map(low_rank, ranks)),
            head, norm(), normal(1, C, scale=0.3, shift=0.5), matrix(hidden, C), matrix(C, hidden), gates, None,
        )  # fmt: skip

    def states():
        wkv = normal(sequences, C // head_size, head_size, head_size, of=FP64 if dtype == FP64 else FP32)
        return LayerStates(normal(sequences, C), wkv, normal(sequences, C))

    def memory():
        scale, length, copy = (normal(matches, *size) for size in ((C,), (max(LENGTHS), C), (max(LENGTHS),)))
        return Memory(scale, length, copy, torch.tensor(LENGTHS))

    weights = [layer(number) for number in range(layers)]
    return Network(
        normal(vocab, C), norm(), weights, [states() for _ in range(layers)], norm(), matrix(vocab, C),
        memory() if matches else None,
    )  # fmt: skip


def of_codes(network, bits):
    """`network` with its large matrices of codes, and with the matrices that these stand for."""
    names = "receptance", "key", "value", "output", "ffn_key", "ffn_value"
    coded = [
        layer._replace(**{name: CodedMatrix.of(getattr(layer, name), bits) for name in names})
        for layer in network.layers
    ]
    stood_for = [
        layer._replace(**{name: getattr(layer, name).dequantized(network.head.dtype) for name in names})
        for layer in coded
    ]
    head = CodedMatrix.of(network.head, bits)
    return (
        network._replace(layers=coded, head=head),
        network._replace(layers=stood_for, head=head.dequantized(network.head.dtype)),
    )


def embedded(network, ids, recalled=None):
    """What the network begins with, (n, C)."""
    x = network.embedding[ids]
    for k, (predicted, length) in enumerate([] if recalled is None else recalled.permute(1, 2, 0)):
        memory = network.memory
        added = network.embedding[predicted] * memory.scale[k] + memory.length[k, memory.rows[length] - 1]
        x = torch.where((length > 0).unsqueeze(1), x + added, x)
    weight, bias, eps = network.first_norm
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def by_definition(network, sequences, ids, gates=None, recalled=None):
    """What TokenStep computes, by the definition of a block."""
    x, v_first = embedded(network, ids, recalled), None
    plain = x if recalled is None else embedded(network, ids)
    for number, (layer, states) in enumerate(zip(network.layers, network.states, strict=True)):
        own = LayerStates(*(part[sequences] for part in states))
        x, v_first = time_mix(PLAIN, layer, x, own, v_first)
        x = channel_mix(PLAIN, layer, x, own, None if gates is None else gates[number], plain)
        for part, new in zip(states, own, strict=True):
            part[sequences] = new
    weight, bias, eps = network.norm
    logits = F.linear(F.layer_norm(x, weight.shape, weight, bias, eps), network.head)
    for k, (predicted, length) in enumerate([] if recalled is None else recalled.permute(1, 2, 0)):
        raised = torch.where(length > 0, network.memory.copy[k, network.memory.rows[length] - 1], 0)
        logits.scatter_add_(1, predicted.unsqueeze(1), raised.unsqueeze(1).to(logits.dtype))
    return logits


def tokens(sizes, n, gates=None, layers=3, seed=1, matches=0):
    """n ids, gates (L, n, their width) in bf16, and matches (n, K, 2), of all lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = {"output": sizes["C"], "hidden": sizes["hidden"], None: None}[gates]
    ids = torch.randint(sizes["vocab"], (n,), generator=generator).tolist()
    rows = None if width is None else (1 + 0.5 * torch.randn(layers, n, width, generator=generator)).to(BF16)
    ends = torch.tensor([sizes["vocab"], len(LENGTHS)])
    recalled = (torch.rand(n, matches, 2, generator=generator) * ends).long() if matches else None
    if recalled is not None:
        recalled[0, 0, 1] = 0  # no match
    return ids, rows, recalled


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def check_distances(rounds):
    """At most twice eager's error: the root of the mean square over all rounds, of which one may be small by chance.

    A round has what the step gave, what eager gave, and the truth, of logits and of each part of the states.
    """
    for alike in zip(*rounds, strict=True):
        mine, eager = (math.sqrt(sum(distance(one[n], one[2]) ** 2 for one in alike) / len(alike)) for n in (0, 1))
        assert mine < max(2 * eager, 1e-6)


def parts(states):
    return [part.clone() for layer in states for part in layer]
