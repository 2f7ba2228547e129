"""Frozen weights in 8 or 4 bits: linear layers of bitsandbytes in the place of those of the blocks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn

from heron.errors import ConfigError
from heron.model.plain import is_plain
from heron.model.rwkv import RWKV

DEVICES = ("cuda",)  # bitsandbytes computes on a CPU too, many times slower than a product in bf16
BYTES = {"int8": 1 + 4 / 2048, "nf4": 0.5 + 1 / 64}  # of a weight, with its scale: fp32 of a row, 1 of 64, about


def quantized_layers(model: RWKV) -> dict[str, nn.Linear]:
    """The layers that are quantized, by name: the matrices of the blocks. Embedding, head and the rest stay."""
    named = model.blocks.named_modules(prefix="blocks")
    return {name: module for name, module in named if is_plain(module, nn.Linear)}


def quantize(model: RWKV, kind: str, device: torch.device) -> None:
    """Put the matrices of the blocks on a GPU in the form `kind`, one after another; activations are bf16.

    int8 (LLM.int8, arXiv:2208.07339): a scale for each row, outliers of the activations apart. nf4 (QLoRA,
    arXiv:2305.14314): 16 values of a normal distribution, a scale for each 64 weights, the scales in 8 bits.

    Raises:
        ConfigError: no GPU, or no bitsandbytes.
    """
    check_device(kind, device)
    library = bitsandbytes_library(kind)
    for name, layer in quantized_layers(model).items():
        model.set_submodule(name, _quantized(library, layer, kind, device))


def check_device(kind: str, device: torch.device) -> None:
    """ConfigError where frozen weights cannot have the form `kind` on this device."""
    if device.type not in DEVICES:
        raise ConfigError(
            f"base {kind}: is for a GPU, and the device is {device.type}; use --base fp32, or --base bf16 --dtype bf16"
        )


def bitsandbytes_library(kind: str) -> ModuleType:
    """The library; ConfigError that says what to install where it is missing."""
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"base {kind} needs the package bitsandbytes ({error}); install it: pip install 'heron-rwkv[quantized]'"
        ) from None
    return bitsandbytes


def _quantized(library: ModuleType, layer: nn.Linear, kind: str, device: torch.device) -> nn.Module:
    weight, sizes = layer.weight.detach().to(torch.bfloat16), (layer.in_features, layer.out_features)
    with torch.device("meta"):
        if kind == "int8":
            new: Any = library.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=6.0)
        else:
            new = library.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    if kind == "int8":
        new.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        new.weight = library.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new)
    new.weight = new.weight.to(device)  # it is quantized on the way
    return new
