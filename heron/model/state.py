"""What a model remembers between calls: per layer two shifted activations and one WKV matrix per head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from heron.config import ModelConfig
from heron.errors import ConfigError


class LayerState(NamedTuple):
    """The memory of one block."""

    att_shift: Tensor  # (B, C), the last input of the time mix (after ln1)
    wkv: Tensor  # (B, H, N_value, N_key), fp32 (fp64 in a fp64 model)
    ffn_shift: Tensor  # (B, C), the last input of the channel mix (after ln2)


@dataclasses.dataclass(frozen=True)
class State:
    """One :class:`LayerState` per block. The model never changes a state in place: each call returns a new one."""

    layers: tuple[LayerState, ...]

    @classmethod
    def zeros(cls, config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first token. `dtype` is that of the activations; the WKV part is at least fp32."""
        wkv_dtype = torch.promote_types(dtype, torch.float32)
        shift = torch.zeros(batch_size, config.n_embd, device=device, dtype=dtype)
        wkv = torch.zeros(batch_size, config.n_head, config.head_size, config.head_size, device=device, dtype=wkv_dtype)
        return cls(tuple(LayerState(shift, wkv, shift) for _ in range(config.n_layer)))

    @property
    def batch_size(self) -> int:
        """Number of sequences (B)."""
        return self.layers[0].wkv.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the whole state takes; the same after one token and after a million."""
        return sum(part.nbytes for layer in self.layers for part in layer)

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """A new state with `function` applied to every tensor."""
        return State(tuple(LayerState(*map(function, layer)) for layer in self.layers))

    def detach(self) -> State:
        """The same numbers, cut off from the graph: what truncated backpropagation through time hands on."""
        return self.map(Tensor.detach)

    def clone(self) -> State:
        """A copy that shares no memory."""
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str) -> State:
        """The state on another device, dtypes kept."""
        return self.map(lambda part: part.to(device))

    def to_list(self) -> list[Tensor]:
        """Upstream's flat list of 3 * n_layer tensors: att shift, wkv, ffn shift of block 0, then of block 1, ..."""
        return [part for layer in self.layers for part in layer]

    @classmethod
    def from_list(cls, parts: Sequence[Tensor]) -> State:
        """The inverse of :meth:`to_list`."""
        if not parts or len(parts) % 3:
            raise ConfigError(f"state list: wanted 3 tensors per layer, got {len(parts)} tensors")
        return cls(tuple(LayerState(*parts[i : i + 3]) for i in range(0, len(parts), 3)))

    def check(self, config: ModelConfig, batch_size: int) -> None:
        """Refuse a state that another model or another batch size made (ConfigError)."""
        if len(self.layers) != config.n_layer:
            raise ConfigError(f"state: wanted {config.n_layer} layers, got {len(self.layers)}")
        shift = (batch_size, config.n_embd)
        wanted = LayerState(shift, (batch_size, config.n_head, config.head_size, config.head_size), shift)
        for i, layer in enumerate(self.layers):
            for name, part, shape in zip(LayerState._fields, layer, wanted, strict=True):
                if tuple(part.shape) != shape:
                    raise ConfigError(f"state of layer {i}, {name}: wanted {shape}, got {tuple(part.shape)}")


def shifted(x: Tensor, last: Tensor) -> Tensor:
    """The previous token's vector at each position: x (B, T, C) moved by one, `last` (B, C) in front."""
    return torch.cat((last.unsqueeze(1).to(x.dtype), x[:, :-1]), dim=1)


def last_of(x: Tensor) -> Tensor:
    """The last token's vector of x (B, T, C), as (B, C) of its own: a view would keep all T in memory."""
    return x[:, -1].clone()
