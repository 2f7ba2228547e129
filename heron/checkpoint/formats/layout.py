"""How other tools name and shape the tensors of an RWKV-7: one table per tool, read in both directions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from heron.config import ModelConfig
from heron.errors import CheckpointError, did_you_mean

LERP = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")  # the order wherever the six are fused into one tensor


def same(tensor: Tensor) -> Tensor:
    """As it is."""
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """(in, out) to (out, in) and back."""
    return tensor.t().contiguous()


def flat(tensor: Tensor) -> Tensor:
    """(1, 1, C) to (C,)."""
    return tensor.reshape(-1)


def row(tensor: Tensor) -> Tensor:
    """(C,), (1, C) and so on to (1, 1, C); any other shape stays, for the model to refuse."""
    return tensor.reshape(1, 1, -1) if tensor.dim() and tensor.shape[-1] == tensor.numel() else tensor


def confirm(told: Mapping[str, object], wanted: Mapping[str, object], source: object) -> None:
    """CheckpointError where metadata contradict what their tensors want; absent or null fields contradict nothing."""
    for field, value in wanted.items():
        if told.get(field) not in (None, value):
            raise CheckpointError(f"{source}: {field} is {repr(told[field])[:80]}, but its tensors want {value!r}")


def beyond_rwkv7(config: ModelConfig) -> str | None:
    """What a model is that has more than an RWKV-7, such as "v8" or "v7 with ROSA"; None for one that has not."""
    if config.rosa is not None or config.memory is not None:
        return f"{config.variant} with ROSA"
    return None if config.variant == "v7" else config.variant


class Place(NamedTuple):
    """Where a tensor of a block goes, and how its shape changes on the way there and back."""

    theirs: str
    out: Callable[[Tensor], Tensor] = same
    back: Callable[[Tensor], Tensor] = same


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one tool.

    Attributes:
        tool: for messages.
        layers: what stands before the number of a layer.
        top: upstream's names outside of blocks to the tool's.
        block: upstream's names within a block to the tool's.
    """

    tool: str
    layers: str
    top: Mapping[str, str]
    block: Mapping[str, Place]

    def out(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Upstream-named tensors under the tool's names. KeyError: a tensor that the layout lacks."""
        renamed = {}
        for name, tensor in tensors.items():
            if name in self.top:
                renamed[self.top[name]] = tensor
            else:
                _, layer, part = name.split(".", 2)
                place = self.block[part]
                renamed[f"{self.layers}.{layer}.{place.theirs}"] = place.out(tensor)
        return renamed

    def back(self, tensors: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
        """The inverse of :meth:`out`.

        Raises:
            CheckpointError: a tensor that is not in the table, or a matrix that is none; it names file and tensor.
        """
        top = {theirs: ours for ours, theirs in self.top.items()}
        block = {place.theirs: (ours, place.back) for ours, place in self.block.items()}
        renamed = {}
        for name, tensor in tensors.items():
            found = re.fullmatch(rf"{re.escape(self.layers)}\.(0|[1-9]\d{{0,4}})\.(.+)", name)
            if name in top:
                renamed[top[name]] = tensor
            elif found and found[2] in block:
                ours, change = block[found[2]]
                if change is transposed and tensor.dim() != 2:
                    raise CheckpointError(f"{source}: {name} must have 2 dimensions, got {tuple(tensor.shape)}")
                renamed[f"blocks.{found[1]}.{ours}"] = change(tensor)
            else:
                known = [f"{self.layers}.{found[1]}.{part}" for part in block] if found else top
                hint = did_you_mean(name, known)
                raise CheckpointError(
                    f"{source}: {name[:80]!r} is not part of an RWKV-7 in the layout of {self.tool}.{hint}"
                )
        return renamed
