"""State tuning: an initial state that trains, while every weight stays as it is, and that each sequence starts from."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from heron.config import ModelConfig
from heron.errors import CheckpointError, ConfigError
from heron.model.state import State, States

BASE = "heron_base"  # in a file, the fingerprint of the model that the state was tuned for: (8,) uint8
# Names in a file; the shifts are ours.
TUNED = re.compile(rf"(blocks\.\d+\.(att\.time_state|(att|ffn)\.shift_state)|{BASE})$")


class TunedState(nn.Module):
    """The WKV state of each layer as a parameter (H, N_value, N_key), fp32, zeros at first.

    Args:
        config: of the model.
        token_shifts: whether the two shifted activations (C,) of each layer train too. Upstream's files have none.

    Raises:
        ConfigError: a rosa-lm, which has no WKV state.
    """

    def __init__(self, config: ModelConfig, token_shifts: bool = False):
        super().__init__()
        if not config.has_time_mix:
            raise ConfigError(f"state: a {config.variant} has no WKV state to tune; take the method lora or full")
        L, C, H, N = config.n_layer, config.n_embd, config.n_head, config.head_size
        self.config = config
        self.wkv = nn.ParameterList(torch.zeros(H, N, N) for _ in range(L))
        self.att_shift = nn.ParameterList(torch.zeros(C) for _ in range(L if token_shifts else 0))
        self.ffn_shift = nn.ParameterList(torch.zeros(C) for _ in range(L if token_shifts else 0))

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor], source: object) -> TunedState:
        """The inverse of :meth:`tensors`; those of a model's weights are passed over.

        Raises:
            CheckpointError: a tensor is missing, one too many, misshaped, or holds NaN or infinity.
        """
        tensors = {name: tensor for name, tensor in tensors.items() if TUNED.match(name) and name != BASE}
        tuned = cls(config, any(name.endswith(".shift_state") for name in tensors))
        own = tuned.tensors()
        n_layer = config.n_layer
        if more := tensors.keys() - own.keys():
            raise CheckpointError(f"{source}: {min(more)}: more layers than the {n_layer} of this model")
        for name, parameter in own.items():
            if name not in tensors:
                raise CheckpointError(f"{source}: tensor {name} is missing: no tuned state of {n_layer} layers")
            found = tensors[name]
            if found.shape != parameter.shape or not found.is_floating_point():
                got = f"{tuple(found.shape)} {found.dtype}"
                raise CheckpointError(f"{source}: {name} must be {tuple(parameter.shape)}, floating, got {got}")
            if not bool(found.isfinite().all()):
                raise CheckpointError(
                    f"{source}: {name} holds NaN or infinity: its tuning diverged, or the file is damaged"
                )
            parameter.copy_(found)
        return tuned

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds: ``blocks.i.att.time_state``, upstream's name and layout, and ours of the shifts."""
        named = {f"blocks.{i}.att.time_state": part for i, part in enumerate(self.wkv)}
        for kind, parts in (("att", self.att_shift), ("ffn", self.ffn_shift)):
            named |= {f"blocks.{i}.{kind}.shift_state": part for i, part in enumerate(parts)}
        return {name: part.detach() for name, part in named.items()}

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None, dtype: torch.dtype = torch.float32) -> States:
        """The state to start from, for `RWKV.forward` and `RWKV.loss`; gradients flow back into the parameters.

        Args:
            tokens: (B, T); with `cu_seqlens` the packed sequences of (1, T).
            dtype: of the model's activations.
        """
        n_seq = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if cu_seqlens is not None and self.config.state_grows:
            return tuple(self._repeated(1, dtype) for _ in range(n_seq))
        return self._repeated(n_seq, dtype)

    def _repeated(self, n_seq: int, dtype: torch.dtype) -> State:
        start = State.zeros(self.config, n_seq, self.wkv[0].device, dtype)
        layers = []
        for i, (layer, wkv) in enumerate(zip(start.layers, self.wkv, strict=True)):
            layer = layer._replace(wkv=wkv.to(layer.wkv.dtype).repeat(n_seq, 1, 1, 1))
            if len(self.att_shift):
                shifts = (self.att_shift[i], self.ffn_shift[i])
                att, ffn = (part.to(dtype).repeat(n_seq, 1) for part in shifts)
                layer = layer._replace(att_shift=att, ffn_shift=ffn)
            layers.append(layer)
        return State(tuple(layers), start.tokens)
