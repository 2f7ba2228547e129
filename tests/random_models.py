"""Small models in which no weight is at a neutral value; tests get them by the fixtures of tests/conftest.py."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

import heron

_GATES = tuple(f".{table}.weight" for table in ("enn", "enn4", "ennk", "emm", "k_emb", "v_emb"))


def random_model(seed: int = 0, **changes) -> heron.RWKV:
    """A small fp32 RWKV with random weights and odd sizes, of these ModelConfig fields."""
    sizes = dict(n_layer=3, n_embd=32, vocab_size=37, head_size=16, ffn_dim=50)
    ranks = dict(decay_rank=5, iclr_rank=6, value_rank=7, gate_rank=9)
    config = heron.ModelConfig(**{"variant": "v8", **sizes, **ranks, **changes})
    return copy.deepcopy(_random_model(config, seed))


@functools.lru_cache(maxsize=100)  # a copy takes a third of the time
def _random_model(config: heron.ModelConfig, seed: int) -> heron.RWKV:
    with torch.device("meta"):  # the reference initial values would only be overwritten
        model = heron.RWKV(config)
    randomize(model.to_empty(device="cpu"), seed)
    if not config.has_ln0:
        model.blocks[0].ln0.reset_parameters()  # no forward reads it; a file in which it is neutral loads silently
    return model


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value under which its whole equation matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            normal = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_random_value(name, normal, torch.rand(parameter.shape, generator=generator)))
    return model


def _random_value(name: str, normal: Tensor, uniform: Tensor) -> Tensor:
    leaf = name.split(".")[-1]
    if name == "emb.weight":
        return normal
    if leaf == "bias":
        return 0.2 * normal
    if normal.dim() == 1 or name.endswith(_GATES):
        return 1 + 0.3 * normal
    if name.endswith("s_emb.weight"):
        return 0.2 * normal
    if leaf == "w0":
        return 8 * uniform - 6  # decays from 0.586 to 0.9985
    if leaf == "r_k":
        return 0.3 * normal
    if normal.dim() == 3:
        return 0.5 + 0.3 * normal
    fan_in = normal.shape[1] if leaf == "weight" else normal.shape[0]
    return normal / fan_in**0.5
