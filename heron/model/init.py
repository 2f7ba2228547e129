"""Every initial value in one table. Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py.

The DeepEmbed row is our own choice (nothing is public): gates of 1, so that a fresh v8 model computes what v7 does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from heron.config import ModelConfig


class Rule(NamedTuple):
    """How one parameter starts: in words for `heron info --params`, and as a function of its shape."""

    text: str
    make: Callable[[torch.Size], Tensor]


def initialize(model: nn.Module, config: ModelConfig) -> None:
    """Fill every parameter by its rule; draws from torch's global generator in parameter order."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config))


def initial_value(name: str, shape: torch.Size, config: ModelConfig) -> Tensor:
    """The fp32 starting value of a parameter, in its stored shape (vectors are (1, 1, C))."""
    return rule(name, config).make(shape)


def rule(name: str, config: ModelConfig) -> Rule:
    """The rule of the parameter that `state_dict()` calls `name`, such as "blocks.3.att.w0".

    In the texts, u = c/C, l is the layer, L their number, z zigzags from -1 to 1 inside each head, m runs from -0.5 to
    0.5 over the channels, p = 1 - l/L, q = l/(L-1).
    """
    C, V, L, N = config.n_embd, config.vocab_size, config.n_layer, config.head_size
    if name == "emb.weight":
        return Rule("uniform +-1e-4", lambda shape: torch.empty(shape).uniform_(-1e-4, 1e-4))
    if name == "head.weight":
        return _orthogonal(0.5 * math.sqrt(V / C) if V > C else 0.5)
    if not name.startswith("blocks."):  # ln_out
        return _constant(1.0 if name.endswith(".weight") else 0.0)

    _, index, tail = name.split(".", 2)
    layer = int(index)
    p = 1 - layer / L
    q = layer / (L - 1) if L > 1 else 0.0

    c = torch.arange(C, dtype=torch.float64)
    u = c / C
    m = c / max(C - 1, 1) - 0.5
    in_head = (c % N - (N - 1) / 2) / ((N - 1) / 2)
    z = in_head * in_head.abs()

    table = {
        "ln0.weight": _constant(1.0),
        "ln0.bias": _constant(0.0),
        "ln1.weight": _constant(1.0),
        "ln1.bias": _constant(0.0),
        "ln2.weight": _constant(1.0),
        "ln2.bias": _constant(0.0),
        "att.x_r": _vector("1 - u^(0.2 p)", 1 - u ** (0.2 * p)),
        "att.x_w": _vector("1 - u^(0.9 p)", 1 - u ** (0.9 * p)),
        "att.x_k": _vector("1 - u^(0.7 p)", 1 - u ** (0.7 * p)),
        "att.x_v": _vector("1 - u^(0.7 p)", 1 - u ** (0.7 * p)),
        "att.x_a": _vector("1 - u^(0.9 p)", 1 - u ** (0.9 * p)),
        "att.x_g": _vector("1 - u^(0.2 p)", 1 - u ** (0.2 * p)),
        "att.w0": _vector("-5.5 + 6 (m+.5)^(1+q^.3) + 2.5 z", -5.5 + 6 * (m + 0.5) ** (1 + q**0.3) + 2.5 * z),
        "att.a0": _vector("-0.19 + 0.3 z + 0.4 m", -0.19 + 0.3 * z + 0.4 * m),
        "att.v0": _vector("0.73 - 0.4 m", 0.73 - 0.4 * m),
        "att.w1": _constant(0.0),
        "att.a1": _constant(0.0),
        "att.v1": _constant(0.0),
        "att.g1": _constant(0.0),
        "att.w2": _orthogonal(0.1, widen=True),
        "att.a2": _orthogonal(0.1, widen=True),
        "att.v2": _orthogonal(0.1, widen=True),
        "att.g2": _orthogonal(0.1, widen=True),
        "att.k_k": _vector("0.71 - 0.1 m", 0.71 - 0.1 * m),
        "att.k_a": _constant(1.02),
        "att.r_k": _constant(-0.04),
        "att.receptance.weight": _orthogonal(1.0),
        "att.key.weight": _orthogonal(0.1),
        "att.value.weight": _orthogonal(1.0),
        "att.output.weight": _constant(0.0),
        "att.ln_x.weight": _constant(((1 + layer) / L) ** 0.7),
        "att.ln_x.bias": _constant(0.0),
        "ffn.x_k": _vector("1 - u^(p^4)", 1 - u ** (p**4)),
        "ffn.key.weight": _orthogonal(1.0),
        "ffn.value.weight": _constant(0.0),
        "ffn.enn.weight": _constant(1.0),
    }
    return table[tail]


def _constant(value: float) -> Rule:
    return Rule(f"{value:.4g}", lambda shape: torch.full(shape, value))


def _vector(text: str, values: Tensor) -> Rule:
    return Rule(text, lambda shape: values.float().view(shape))


def _orthogonal(gain: float, widen: bool = False) -> Rule:
    """Orthonormal rows or columns times `gain`; `widen`: times sqrt(rows/columns) more where rows > columns."""

    def make(shape: torch.Size) -> Tensor:
        rows, columns = shape
        factor = math.sqrt(rows / columns) if widen and rows > columns else 1.0
        return nn.init.orthogonal_(torch.empty(shape), gain=gain * factor)

    return Rule(f"orthogonal, gain {gain:.4g}", make)
