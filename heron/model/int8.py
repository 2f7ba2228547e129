"""Weights in 8 bits for running a model: half the memory of bf16, and half of what a token of one text reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heron.errors import ConfigError
from heron.model.quantized import quantized_layers
from heron.model.rwkv import RWKV
from heron.ops.int8 import GROUP, Int8Matrix


class Int8Linear(nn.Module):
    """A linear layer without bias whose matrix is in 8 bits; sequences read a copy in their own dtype, made anew."""

    codes: Tensor
    scales: Tensor

    def __init__(self, matrix: Int8Matrix):
        super().__init__()
        self.register_buffer("codes", matrix.codes)
        self.register_buffer("scales", matrix.scales)

    @property
    def matrix(self) -> Int8Matrix:
        """The weights, where they are."""
        return Int8Matrix(self.codes, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.matrix.dequantized(x.dtype))


def is_int8(model: nn.Module) -> bool:
    """Whether :func:`quantize_for_running` has been at `model`."""
    return isinstance(getattr(model, "head", None), Int8Linear)


def quantize_for_running(model: RWKV, device: torch.device) -> RWKV:
    """`model` itself, to run on `device`, the matrices of blocks and head now in 8 bits there (heron.ops.int8).

    Embedding, tables, low-rank matrices and vectors stay as and where they are. It can be run, not trained or saved.

    Raises:
        ConfigError: not a v7 or v8 without ROSA layers, neither CPU nor GPU, or sizes that are no multiples of 64.
    """
    config = model.config
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"weights int8: runs on a CPU or a CUDA GPU, not on {device.type}; add --device cpu")
    if config.variant not in ("v7", "v8") or config.rosa is not None:
        what = config.variant if config.rosa is None else f"{config.variant} with ROSA layers"
        raise ConfigError(f"weights int8: is for v7 and v8, and this is a {what}; leave --weights int8 out")
    for name, size in (("n_embd", config.n_embd), ("ffn_dim", config.ffn_dim)):
        if size is None or size % GROUP:
            raise ConfigError(
                f"weights int8: {name} must be a multiple of {GROUP}, got {size}; leave --weights int8 out"
            )
    for name, layer in {**quantized_layers(model), "head": model.head}.items():
        model.set_submodule(name, Int8Linear(Int8Matrix.of(layer.weight.to(device))))
    return model
