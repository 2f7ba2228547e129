"""Channel mixing: token shift, a squared-ReLU MLP, and the DeepEmbed gate in one of its three forms.

Equations: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v7_demo.py, rwkv_v7a_demo.py and rwkv_v8_rc00_demo.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from heron.config import ModelConfig
from heron.model.deep_embed import DeepEmbed, Lookup, rows
from heron.model.plain import is_plain

GATE_RANK = 32  # the low-rank gate squeezes its input to 32 values and mixes them by the token's own 32 x 32 matrix


class ChannelMix(nn.Module):
    """One layer's feed-forward network. Parameter names and shapes are those of the upstream files.

    `config.deep_embed` says which gate it has: none (v7), "output" on what it writes (v8), "hidden" on its hidden
    channels (the 4x form, whose key `enn4` is our own), or "low-rank", computed from x (v7a, v7b).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        V, C, F, R = config.vocab_size, config.n_embd, cast(int, config.ffn_dim), GATE_RANK
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
        """The rows (B, T, width) that the input tokens have in a table of hidden channels; None without such a table.

        In the dtype of the activations.
        """
        if self.form == "low-rank":
            found = rows(self.s_emb, self.s_emb_x, tokens)
        elif self.form == "hidden":
            found = self.enn4(tokens.ids)
        else:
            return None
        return found.to(tokens.embedded.dtype)

    @property
    def mixes(self) -> list[Tensor]:
        """How much of the token before is in the input, (1, 1, C); for the low-rank gate the unshifted input, too."""
        return [self.x_k, torch.zeros_like(self.x_k)] if self.form == "low-rank" else [self.x_k]

    def forward(
        self,
        begin: Callable[..., tuple[Tensor, list[Tensor], Tensor]],
        x: Tensor,
        branch: Tensor | None,
        last: Tensor | None,
        of_table: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix channels. As :meth:`heron.model.time_mix.TimeMix.forward`, with ln2; `of_table` are the `table_rows`.

        Returns:
            The residual stream x + branch, what is to be added to it (B, T, C) but for :meth:`gate`, and the new last.
        """
        x, mixed, last = begin(x, branch, self.mixes, last, cu_seqlens)
        hidden = torch.relu(self.key(mixed[0])).square()  # (B, T, F)
        if of_table is not None:
            gate = of_table if self.form == "hidden" else self._low_rank_gate(mixed[1], of_table)
            hidden = hidden * gate.to(hidden.dtype)
        return x, self.value(hidden), last

    def gate(self, out: Tensor, ids: Tensor) -> Tensor:
        """The branch's output (B, T, C) times its tokens' rows, where the table gates that; else as it is."""
        if self.form != "output":
            return out
        return self.enn.gate(out, ids) if is_plain(self.enn, DeepEmbed) else out * self.enn(ids).to(out.dtype)

    def _low_rank_gate(self, x: Tensor, of_table: Tensor) -> Tensor:
        """(B, T, F) gates from x, which is *not* shifted, and the tokens' rows."""
        B, T, _ = x.shape
        squeezed = (x @ self.s1).view(B, T, 1, GATE_RANK)
        mix = of_table.view(B, T, GATE_RANK, GATE_RANK)  # [in, out]
        mixed = (squeezed @ mix.to(squeezed.dtype)).view(B, T, GATE_RANK)
        return mixed @ self.s2 + self.s0
