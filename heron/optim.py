"""The reference optimizer groups, each with its reason, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from heron.config import TrainConfig
from heron.errors import ConfigError


class Group(NamedTuple):
    """How the optimizer treats one parameter."""

    name: str
    lr_scale: float
    decays: bool
    reason: str


FAST = Group("2x", 2.0, False, "the decay bias learns at twice the rate")
DECAY = Group("decay", 1.0, True, "a large matrix: only these take weight decay")
PLAIN = Group("1x", 1.0, False, "vectors, norms and low-rank matrices do not decay")
TABLE = Group("table", 1.0, False, "rows by token, most of them gates around 1: decay would pull them to 0")

_TABLES = tuple(f".{name}.weight" for name in ("enn", "enn4", "s_emb", "ennk", "emm", "k_emb", "v_emb"))


def group_of(name: str, parameter: torch.Tensor) -> Group:
    """The group of a parameter, by name and shape.

    Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py, configure_optimizers. TABLE is our own choice, since that
    rule would let weight decay act on the DeepEmbed gates; the other parameters that v7 lacks go by that rule.
    """
    if name.endswith(_TABLES):
        return TABLE
    if "att.w0" in name:
        return FAST
    if parameter.squeeze().dim() >= 2 and name.endswith(".weight"):
        return DECAY
    return PLAIN


def build_optimizer(
    model: nn.Module,
    lr: float = 6e-4,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-18,
) -> torch.optim.AdamW:
    """AdamW over the reference groups. Each group carries "name" and "lr_scale" beside torch's own keys.

    Raises:
        ConfigError: the model has no parameter to train.
    """
    members: dict[Group, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault(group_of(name, parameter), []).append(parameter)
    if not members:
        raise ConfigError("build_optimizer: the model has no parameter that requires a gradient")
    groups = [
        {
            "name": group.name,
            "params": parameters,
            "lr": lr * group.lr_scale,
            "lr_scale": group.lr_scale,
            "weight_decay": weight_decay if group.decays else 0.0,
        }
        for group, parameters in members.items()
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (from 0): a cosine over tokens, times a linear warm-up from 1%.

    Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/trainer.py.
    """
    per_step = config.tokens_per_step
    total = config.max_tokens if config.max_tokens is not None else config.max_steps * per_step
    span = total - config.warmup_steps * per_step
    progress = (step - config.warmup_steps) * per_step / span if span > 0 else 0.0  # a run of warm-up only
    progress = min(max(progress, 0.0), 1.0)
    ratio = config.lr_final / config.lr_init if config.lr_init else 0.0
    lr = config.lr_init * ((0.5 + ratio / 2) + (0.5 - ratio / 2) * math.cos(math.pi * progress))
    if step < config.warmup_steps:
        lr *= 0.01 + 0.99 * step / config.warmup_steps
    return lr
