"""Products in fp8 for training: the large matrices of the blocks, which take most of a step's arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heron import ops
from heron.model.rwkv import RWKV
from heron.ops.fp8_linear import why_not_fp8

MATRICES = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")  # of a block
Y_IN_BF16 = "ffn.value"  # its forward product in fp8 would cost nearly all the loss that fp8 costs (README of the op)


class Fp8Linear(nn.Linear):
    """A linear layer without bias whose weight stays as it is; its products are :func:`heron.ops.fp8_linear`."""

    y_in_bf16 = False

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), both bf16."""
        return ops.fp8_linear(input, self.weight, self.y_in_bf16)


def multiply_in_fp8(network: RWKV) -> None:
    """Make the MATRICES of `network`, which are in bf16, multiply in fp8, except those of sizes that fp8 does not take.

    The forward product of Y_IN_BF16 stays in bf16. Names and order of the parameters stay; each is the same object.
    """
    for name, layer in _matrices(network).items():
        if why_not_fp8(layer.weight) is None:
            with torch.device("meta"):
                new = Fp8Linear(layer.in_features, layer.out_features, bias=False)
            new.weight, new.y_in_bf16 = layer.weight, name.endswith(Y_IN_BF16)
            network.set_submodule(name, new)


def described(network: RWKV) -> str:
    """Which matrices of a network of :func:`multiply_in_fp8` are in fp8 and which are not, in words."""
    n_in_fp8 = sum(isinstance(module, Fp8Linear) for module in network.modules())
    left = {name: layer for name, layer in _matrices(network).items() if not isinstance(layer, Fp8Linear)}
    told = f"{n_in_fp8} matrices of the blocks in fp8, all else in bf16"
    if not left:
        return told
    name, layer = next(iter(left.items()))
    return f"{told}; so are {len(left)} more, {name} first: {why_not_fp8(layer.weight)}"


def _matrices(network: RWKV) -> dict[str, nn.Linear]:
    named = network.blocks.named_modules(prefix="blocks")
    return {name: module for name, module in named if name.endswith(MATRICES) and isinstance(module, nn.Linear)}
