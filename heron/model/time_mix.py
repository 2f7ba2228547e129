"""Time mixing x070: token shift, six projections, the WKV7 recurrence, group norm, bonus, gate.

Equations: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py and rwkv_v7_demo.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heron import ops
from heron.config import ModelConfig
from heron.model.state import last_of, shifted

GROUP_NORM_EPS = 64e-5  # upstream keeps 64e-5 at every head size


class TimeMix(nn.Module):
    """One layer's attention substitute. Parameter names and shapes are those of the upstream files."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        C, H, N = config.n_embd, config.n_head, config.head_size
        for letter in "rwkvag":
            setattr(self, f"x_{letter}", nn.Parameter(torch.empty(1, 1, C)))
        ranks = dict(w=config.decay_rank, a=config.iclr_rank, v=config.value_rank, g=config.gate_rank)
        for letter, rank in ranks.items():
            if letter != "g":
                setattr(self, f"{letter}0", nn.Parameter(torch.empty(1, 1, C)))
            setattr(self, f"{letter}1", nn.Parameter(torch.empty(C, rank)))
            setattr(self, f"{letter}2", nn.Parameter(torch.empty(rank, C)))
        self.k_k = nn.Parameter(torch.empty(1, 1, C))
        self.k_a = nn.Parameter(torch.empty(1, 1, C))
        self.r_k = nn.Parameter(torch.empty(H, N))
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.ln_x = nn.GroupNorm(H, C, eps=GROUP_NORM_EPS)

    def forward(
        self, x: Tensor, last_x: Tensor, wkv_state: Tensor, v_first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mix along time.

        Args:
            x: (B, T, C), the output of ln1.
            last_x: (B, C), the same of the token before.
            wkv_state: (B, H, N, N), fp32.
            v_first: (B, T, C), layer 0's values; None in layer 0.

        Returns:
            The branch's output (B, T, C), the new last_x, the new wkv_state, and v_first for the layers above.
        """
        delta = shifted(x, last_x) - x
        mixed = [torch.addcmul(x, delta, mix.to(x.dtype)) for mix in self.mixes]
        out, wkv_state, v_first = self.from_mixed(mixed, wkv_state, v_first)
        return out, last_of(x), wkv_state, v_first

    @property
    def mixes(self) -> list[Tensor]:
        """How much of the token before is in each of the six inputs, (1, 1, C)."""
        return [self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g]

    def from_mixed(
        self, mixed: list[Tensor], wkv_state: Tensor | None, v_first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`forward` behind the token shift.

        Args:
            mixed: six of (B, T, C), in the order of `mixes`.
            wkv_state: None: zeros.

        Returns:
            The branch's output (B, T, C), the new wkv_state, and v_first for the layers above.
        """
        x_r, x_w, x_k, x_v, x_a, x_g = mixed
        B, T, C = x_r.shape
        per_head = (B, T, self.n_head, -1)
        r = self.receptance(x_r)
        k = self.key(x_k)
        v = self.value(x_v)
        decay_logits = self.w0 + torch.tanh(x_w @ self.w1) @ self.w2
        iclr = torch.sigmoid(self.a0 + (x_a @ self.a1) @ self.a2)  # in-context learning rate
        gate = torch.sigmoid(x_g @ self.g1) @ self.g2

        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(self.v0 + (x_v @ self.v1) @ self.v2).to(v.dtype))
        removal_key = F.normalize((k * self.k_k).view(per_head), dim=-1, eps=1e-12)  # unit length per head
        k = k * (1 + (iclr - 1) * self.k_a)

        r, decay_logits, k, v, iclr = (t.to(x_r.dtype).view(per_head) for t in (r, decay_logits, k, v, iclr))
        removal_key = removal_key.to(x_r.dtype)
        y, wkv_state = ops.wkv7(r, decay_logits, k, v, -removal_key, removal_key * iclr, wkv_state)

        y = self.ln_x(y.reshape(B * T, C)).view(per_head)
        bonus = (r * k * self.r_k).sum(dim=-1, keepdim=True)  # (B, T, H, 1)
        y = (y + bonus * v).view(B, T, C)
        return self.output(y * gate), wkv_state, v_first
