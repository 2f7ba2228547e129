"""Channel mixing: token shift, a squared-ReLU MLP, and the DeepEmbed gate in one of its three places.

Equations: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v7_demo.py, rwkv_v7a_demo.py and rwkv_v8_rc00_demo.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heron.config import ModelConfig
from heron.model.deep_embed import DeepEmbed, Lookup, rows
from heron.model.state import last_of, shifted

GATE_RANK = 32  # the low-rank gate squeezes its input to 32 values and mixes them by the token's own 32 x 32 matrix


class ChannelMix(nn.Module):
    """One layer's feed-forward network. Parameter names and shapes are those of the upstream files.

    `config.deep_embed` says which gate it has: none (v7), "output" on what it writes (v8), "hidden" on its hidden
    channels (the 4x form, whose key `enn4` is our own), or "low-rank", computed from x (v7a, v7b).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        V, C, F, R = config.vocab_size, config.n_embd, config.ffn_dim, GATE_RANK
        self.form = config.deep_embed
        self.x_k = nn.Parameter(torch.empty(1, 1, C))
        self.key = nn.Linear(C, F, bias=False)
        self.value = nn.Linear(F, C, bias=False)
        if self.form == "output":
            self.enn = DeepEmbed(V, C)
        elif self.form == "hidden":
            self.enn4 = DeepEmbed(V, F)
        elif self.form == "low-rank":
            self.s_emb = DeepEmbed(V, R * R)
            self.s_emb_x = nn.Linear(C, R * R, bias=False)
            self.s1 = nn.Parameter(torch.empty(C, R))
            self.s2 = nn.Parameter(torch.empty(R, F))
            self.s0 = nn.Parameter(torch.empty(F))

    def table_rows(self, tokens: Lookup) -> Tensor | None:
        """The table's rows (B, T, width) of the input tokens, in the dtype of the activations; None without a table."""
        if self.form is None:
            return None
        if self.form == "low-rank":
            found = rows(self.s_emb, self.s_emb_x, tokens)
        else:
            found = (self.enn if self.form == "output" else self.enn4)(tokens.ids)
        return found.to(tokens.embedded.dtype)

    def forward(self, x: Tensor, last_x: Tensor, of_table: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mix channels: x (B, T, C) is the output of ln2, last_x (B, C) the token before, of_table the `table_rows`.

        Returns the branch's output (B, T, C) and the new last_x.
        """
        mixed = torch.addcmul(x, shifted(x, last_x) - x, self.x_k.to(x.dtype))
        out = self.from_mixed(mixed, x, of_table)
        return out * of_table.to(out.dtype) if self.form == "output" else out, last_of(x)

    @property
    def mixes(self) -> list[Tensor]:
        """How much of the token before is in the input, (1, 1, C); for the low-rank gate the unshifted input, too."""
        return [self.x_k, torch.zeros_like(self.x_k)] if self.form == "low-rank" else [self.x_k]

    def from_mixed(self, mixed: Tensor, x: Tensor, of_table: Tensor | None) -> Tensor:
        """:meth:`forward` between the token shift, which made `mixed` (B, T, C) of `x`, and the gate on the output."""
        hidden = torch.relu(self.key(mixed)).square()  # (B, T, F)
        if self.form == "hidden":
            hidden = hidden * of_table.to(hidden.dtype)
        elif self.form == "low-rank":
            hidden = hidden * self._low_rank_gate(x, of_table).to(hidden.dtype)
        return self.value(hidden)

    def _low_rank_gate(self, x: Tensor, of_table: Tensor) -> Tensor:
        """(B, T, F) gates from x, which is *not* shifted, and the tokens' rows."""
        B, T, _ = x.shape
        squeezed = (x @ self.s1).view(B, T, 1, GATE_RANK)
        mix = of_table.view(B, T, GATE_RANK, GATE_RANK)  # [in, out]
        mixed = (squeezed @ mix.to(squeezed.dtype)).view(B, T, GATE_RANK)
        return mixed @ self.s2 + self.s0
