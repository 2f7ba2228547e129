"""From named tensors to a ModelConfig: the variant from the keys, every size from the shapes, and nothing left over."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from heron.config import ModelConfig
from heron.errors import CheckpointError, ConfigError, did_you_mean
from heron.model import RWKV

UNUSED = tuple(f"blocks.0.att.{name}" for name in ("v0", "v1", "v2"))  # in upstream's files, never used by any forward
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The first mark that a file carries names its variant.
_MARKS = (
    ("blocks.0.qkv.k_emb.weight", "v7b"),
    ("blocks.0.ffn.s_emb.weight", "v7a"),
    ("blocks.0.qkv.kkup.weight", "v8-hybrid"),
    ("blocks.0.ffn.enn.weight", "v8"),
    ("blocks.0.att.w1", "v7"),
    ("blocks.0.rosa.q.weight", "rosa-lm"),
    ("rosa1.rosa_qkv.emb", "ROSA toy"),
    ("rosa1.emb0", "ROSA toy"),
)


def config_of(tensors: dict[str, Tensor], source: object) -> ModelConfig:
    """Read variant and sizes from a file's tensors and check every key, shape and dtype.

    Args:
        tensors: named tensors, upstream names.
        source: the file's path, for messages.

    Raises:
        CheckpointError: an unknown variant; a missing, extra or misshaped tensor; a dtype that is not floating.
    """
    variant = _variant(tensors, source)

    def shape(name: str, dims: int) -> torch.Size:
        if name not in tensors:
            raise CheckpointError(f"{source}: tensor {name} is missing (variant {variant})")
        if tensors[name].dim() != dims:
            raise CheckpointError(f"{source}: {name} must have {dims} dimensions, got {tuple(tensors[name].shape)}")
        return tensors[name].shape

    layers = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    vocab_size, n_embd = shape("emb.weight", 2)
    value_block = 1 if len(layers) > 1 else 0
    has_value_rank = value_block or "blocks.0.att.v1" in tensors
    try:
        config = ModelConfig(
            variant=variant,
            n_layer=len(layers),
            n_embd=n_embd,
            vocab_size=vocab_size,
            head_size=shape("blocks.0.att.r_k", 2)[1],
            ffn_dim=shape("blocks.0.ffn.key.weight", 2)[0],
            decay_rank=shape("blocks.0.att.w1", 2)[1],
            iclr_rank=shape("blocks.0.att.a1", 2)[1],
            value_rank=shape(f"blocks.{value_block}.att.v1", 2)[1] if has_value_rank else None,
            gate_rank=shape("blocks.0.att.g1", 2)[1],
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: the sizes in it do not make a {variant} model: {error}") from None
    _check(tensors, config, source)
    return config


def expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor that a model of this config has."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in RWKV(config).state_dict().items()}


def _variant(tensors: dict[str, Tensor], source: object) -> str:
    for mark, variant in _MARKS:
        if mark in tensors:
            if variant not in ("v7", "v8"):
                raise CheckpointError(f"{source}: this is a {variant} file; v7 and v8 are what this version loads")
            return variant
    first = ", ".join(sorted(tensors)[:5]) or "none"
    raise CheckpointError(
        f"{source}: no RWKV-7 or RWKV-8 weights: blocks.0.att.w1 is missing; the first keys are {first}"
    )


def _check(tensors: dict[str, Tensor], config: ModelConfig, source: object) -> None:
    expected = expected_shapes(config)
    problems = []
    for name in expected:
        if name not in tensors and name not in UNUSED:
            near = did_you_mean(name, tensors.keys() - expected.keys())
            problems.append(f"{name} is missing{f' ({near.strip()})' if near else ''}")
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"{name} is not part of a {config.variant} model")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} must be {tuple(expected[name])}, got {tuple(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            problems.append(f"{name} must be floating, got {tensor.dtype}")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{source}: does not fit variant {config.variant} with n_layer {config.n_layer}, n_embd {config.n_embd}, "
            f"vocab_size {config.vocab_size}, head_size {config.head_size}: {'; '.join(problems[:5])}{more}"
        )
