"""Weights in 8 or 4 bits for running a model: a half or a quarter of bf16's memory, and of what a token reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heron.errors import ConfigError
from heron.model.quantized import quantized_layers
from heron.model.rwkv import RWKV
from heron.ops.codes import GROUP, CodedMatrix

BITS = {"int8": 8, "int4": 4}  # of the matrices of blocks; the head, which 4 bits harm most, has 8


class CodedLinear(nn.Module):
    """A linear layer without bias whose matrix is of codes; sequences read a copy in their own dtype, made anew."""

    codes: Tensor
    scales: Tensor
    levels: Tensor | None

    def __init__(self, matrix: CodedMatrix):
        super().__init__()
        for name, part in matrix._asdict().items():
            self.register_buffer(name, part)

    @property
    def matrix(self) -> CodedMatrix:
        """The weights, where they are."""
        return CodedMatrix(self.codes, self.scales, self.levels)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.matrix.dequantized(x.dtype))


def weights_of(model: nn.Module) -> str | None:
    """The key of BITS by which :func:`quantize_for_running` has been at `model`; None: it has not."""
    bits = {module.matrix.bits for module in model.modules() if isinstance(module, CodedLinear)}
    return next((name for name, of_blocks in BITS.items() if of_blocks == min(bits, default=0)), None)


def quantize_for_running(model: RWKV, device: torch.device, weights: str = "int8") -> RWKV:
    """`model` itself, to run on `device`, the matrices of blocks and head now of codes there (heron.ops.codes).

    Embedding, tables, low-rank matrices and vectors stay as and where they are. It can be run, not trained or saved.

    Args:
        weights: a key of BITS.

    Raises:
        ConfigError: not a v7 or v8 without ROSA layers, neither CPU nor GPU, sizes that are no multiples of 64, or
            unknown `weights`.
    """
    config = model.config
    if weights not in BITS:
        raise ConfigError(f"weights: wanted one of {', '.join(BITS)}, got {weights!r}")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"weights {weights}: runs on a CPU or a CUDA GPU, not on {device.type}; add --device cpu")
    if config.variant not in ("v7", "v8") or config.rosa is not None:
        what = config.variant if config.rosa is None else f"{config.variant} with ROSA layers"
        raise ConfigError(f"weights {weights}: is for v7 and v8, and this is a {what}; leave --weights {weights} out")
    for name, size in (("n_embd", config.n_embd), ("ffn_dim", config.ffn_dim)):
        if size is None or size % GROUP:
            raise ConfigError(
                f"weights {weights}: {name} must be a multiple of {GROUP}, got {size}; leave --weights {weights} out"
            )
    for name, layer in quantized_layers(model).items():
        model.set_submodule(name, CodedLinear(CodedMatrix.of(layer.weight.to(device), BITS[weights])))
    model.set_submodule("head", CodedLinear(CodedMatrix.of(model.head.weight.to(device))))
    return model.requires_grad_(False)
