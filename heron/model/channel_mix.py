"""Channel mixing: token shift, a squared-ReLU MLP, and in RWKV-8 the DeepEmbed gate on its output.

Equations: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v7_demo.py and rwkv_v8_rc00_demo.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heron.config import ModelConfig
from heron.model.deep_embed import DeepEmbed
from heron.model.state import last_of, shifted


class ChannelMix(nn.Module):
    """One layer's feed-forward network. Parameter names and shapes are those of the upstream files."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = nn.Linear(config.n_embd, config.ffn_dim, bias=False)
        self.value = nn.Linear(config.ffn_dim, config.n_embd, bias=False)
        self.enn = DeepEmbed(config.vocab_size, config.n_embd) if config.variant == "v8" else None

    def forward(self, x: Tensor, last_x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mix channels: x (B, T, C) is the output of ln2, last_x (B, C) the token before, tokens (B, T) the input ids.

        Returns the branch's output (B, T, C) and the new last_x.
        """
        mixed = torch.addcmul(x, shifted(x, last_x) - x, self.x_k.to(x.dtype))
        hidden = torch.relu(self.key(mixed)).square()
        out = self.value(hidden)
        if self.enn is not None:
            out = out * self.enn(tokens).to(out.dtype)
        return out, last_of(x)
