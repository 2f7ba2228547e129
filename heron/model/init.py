"""Every initial value, by the name of its parameter. Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py.

Nothing is public about DeepEmbed, DeepEmbedAttention and ROSA in a language model. What stands under `_OURS` is our own
choice: under one seed a fresh model of any variant but rosa-lm computes what v7 does, bit for bit, with ROSA or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heron.config import ModelConfig


class Rule(NamedTuple):
    """How one parameter starts: in words for `heron info --params`, and as a function of its shape."""

    text: str
    make: Callable[[torch.Size], Tensor]
    ours: bool = False  # our own choice, not the reference's


def initialize(model: nn.Module, config: ModelConfig) -> None:
    """Fill every parameter by its rule; draws from torch's global generator in parameter order, v7's parameters first,
    those of a ROSA branch and of ROSA memory last.

    So one seed gives every variant the same v7 weights, and a model with ROSA those of its twin without.
    """

    def turn(item: tuple[str, nn.Parameter]) -> int:
        tail = _tail(item[0])
        return 2 if tail.startswith(("rosa.", "memory.")) else int(tail in _OURS)

    parameters = sorted(model.named_parameters(), key=turn)
    with torch.no_grad():
        for name, parameter in parameters:
            parameter.copy_(initial_value(name, parameter.shape, config))


def round_to_bf16(model: nn.Module) -> None:
    """Round every parameter to bf16 and keep its dtype. RWKV-LM stores initial values in bf16, and starts from these.

    Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py, `generate_init_weight` under ``--precision bf16``.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


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
        uniform = _uniform(1e-4)
        if config.has_ln0:
            return uniform
        return Rule(f"layer norm of {uniform.text}", lambda shape: F.layer_norm(uniform.make(shape), (C,)), ours=True)
    if name == "head.weight":
        return _orthogonal(0.5 * math.sqrt(V / C) if V > C else 0.5)
    if name.startswith("memory."):
        return _constant(0.0)._replace(ours=True)
    if not name.startswith("blocks."):  # ln_out
        return _constant(1.0 if name.endswith(".weight") else 0.0)

    tail = _tail(name)
    if tail in _OURS:
        return _OURS[tail]
    layer = int(name.split(".")[1])
    p = 1 - layer / L
    q = layer / (L - 1) if L > 1 else 0.0

    vector = partial(_vector, C, N)
    rules = {
        "ln0.weight": _constant(1.0),
        "ln0.bias": _constant(0.0),
        "ln1.weight": _constant(1.0),
        "ln1.bias": _constant(0.0),
        "ln2.weight": _constant(1.0),
        "ln2.bias": _constant(0.0),
        "att.x_r": vector("1 - u^(0.2 p)", lambda c: 1 - c.u ** (0.2 * p)),
        "att.x_w": vector("1 - u^(0.9 p)", lambda c: 1 - c.u ** (0.9 * p)),
        "att.x_k": vector("1 - u^(0.7 p)", lambda c: 1 - c.u ** (0.7 * p)),
        "att.x_v": vector("1 - u^(0.7 p)", lambda c: 1 - c.u ** (0.7 * p)),
        "att.x_a": vector("1 - u^(0.9 p)", lambda c: 1 - c.u ** (0.9 * p)),
        "att.x_g": vector("1 - u^(0.2 p)", lambda c: 1 - c.u ** (0.2 * p)),
        "att.w0": vector(
            "-5.5 + 6 (m+.5)^(1+q^.3) + 2.5 z", lambda c: -5.5 + 6 * (c.m + 0.5) ** (1 + q**0.3) + 2.5 * c.z
        ),
        "att.a0": vector("-0.19 + 0.3 z + 0.4 m", lambda c: -0.19 + 0.3 * c.z + 0.4 * c.m),
        "att.v0": vector("0.73 - 0.4 m", lambda c: 0.73 - 0.4 * c.m),
        "att.w1": _constant(0.0),
        "att.a1": _constant(0.0),
        "att.v1": _constant(0.0),
        "att.g1": _constant(0.0),
        "att.w2": _orthogonal(0.1, widen=True),
        "att.a2": _orthogonal(0.1, widen=True),
        "att.v2": _orthogonal(0.1, widen=True),
        "att.g2": _orthogonal(0.1, widen=True),
        "att.k_k": vector("0.71 - 0.1 m", lambda c: 0.71 - 0.1 * c.m),
        "att.k_a": _constant(1.02),
        "att.r_k": _constant(-0.04),
        "att.receptance.weight": _orthogonal(1.0),
        "att.key.weight": _orthogonal(0.1),
        "att.value.weight": _orthogonal(1.0),
        "att.output.weight": _constant(0.0),
        "att.ln_x.weight": _constant(((1 + layer) / L) ** 0.7),
        "att.ln_x.bias": _constant(0.0),
        "ffn.x_k": vector("1 - u^(p^4)", lambda c: 1 - c.u ** (p**4)),
        "ffn.key.weight": _orthogonal(1.0),
        "ffn.value.weight": _constant(0.0),
    }
    if tail.startswith("rosa."):
        # A projection, as torch.nn.Linear starts; but a branch beside time mixing writes nothing at first.
        is_neutral = tail.startswith("rosa.o.") and config.has_time_mix
        return (_constant(0.0) if is_neutral else _uniform(C**-0.5))._replace(ours=True)
    return rules[tail]


def _tail(name: str) -> str:
    """ "att.w0" of "blocks.3.att.w0"; a name outside the blocks stays whole."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def _constant(value: float) -> Rule:
    return Rule(f"{value:.4g}", lambda shape: torch.full(shape, value))


def _uniform(bound: float) -> Rule:
    return Rule(f"uniform +-{bound:.4g}", lambda shape: torch.empty(shape).uniform_(-bound, bound))


class _Channels(NamedTuple):
    """u, m and z of :func:`rule`, (C,) fp64."""

    u: Tensor
    m: Tensor
    z: Tensor


def _vector(C: int, N: int, text: str, values: Callable[[_Channels], Tensor]) -> Rule:
    def make(shape: torch.Size) -> Tensor:
        c = torch.arange(C, dtype=torch.float64)
        in_head = (c % N - (N - 1) / 2) / ((N - 1) / 2)
        channels = _Channels(c / C, c / max(C - 1, 1) - 0.5, in_head * in_head.abs())
        return values(channels).float().view(shape)

    return Rule(text, make)


def _orthogonal(gain: float, widen: bool = False) -> Rule:
    """Orthonormal rows or columns times `gain`; `widen`: times sqrt(rows/columns) more where rows > columns."""

    def make(shape: torch.Size) -> Tensor:
        rows, columns = shape
        factor = math.sqrt(rows / columns) if widen and rows > columns else 1.0
        return nn.init.orthogonal_(torch.empty(shape), gain=gain * factor)

    return Rule(f"orthogonal, gain {gain:.4g}", make)


# With s2 at 0 the gate is s0, and with lnv at 0 attention writes nothing, as LoRA starts from a product with 0.
_OURS = {
    name: rule._replace(ours=True)
    for rule, names in (
        (_constant(1.0), "ffn.enn.weight ffn.enn4.weight ffn.s0"),
        (_constant(0.0), "ffn.s2 ffn.s_emb_x.weight"),
        (_orthogonal(0.1), "ffn.s1"),
        (Rule("normal, deviation 0.02", lambda shape: torch.empty(shape).normal_(0, 0.02)), "ffn.s_emb.weight"),
        (_constant(0.0), "qkv.lnv.weight qkv.lnv.bias qkv.lnq.bias qkv.lnk.bias"),
        (_constant(1.0), "qkv.lnq.weight qkv.lnk.weight"),
        (_constant(1.0), "qkv.k_emb.weight qkv.v_emb.weight qkv.ennk.weight qkv.emm.weight"),
        (_constant(0.0), "qkv.k_emb_x.weight qkv.v_emb_x.weight qkv.x_q qkv.x_k qkv.x_v"),
        (_orthogonal(1.0), "qkv.qq.weight qkv.k1 qkv.k2 qkv.v1 qkv.v2"),
        (_constant(1.0), "ln3.weight rosa.rosa_qkv.emb"),
        (_constant(0.0), "ln3.bias rosa.x_q rosa.x_k rosa.x_v"),
        (_orthogonal(1.0), "qkv.kk.weight qkv.kkup.weight qkv.vv.weight qkv.vvup.weight"),
    )
    for name in names.split()
}
