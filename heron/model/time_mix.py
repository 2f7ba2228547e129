"""Time mixing x070: token shift, six projections, the WKV7 recurrence, group norm, bonus, gate.

Equations: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py and rwkv_v7_demo.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from heron import ops
from heron.config import ModelConfig
from heron.model.plain import is_plain
from heron.ops.head_mix import HeadInputs, HeadWeights, head_mix_reference
from heron.ops.spans import Span

GROUP_NORM_EPS = 64e-5  # upstream keeps 64e-5 at every head size


class TimeMix(nn.Module):
    """One layer's attention substitute. Parameter names and shapes are those of the upstream files."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        C, H, N = config.n_embd, config.n_head, config.head_size

        def vector() -> nn.Parameter:
            return nn.Parameter(torch.empty(1, 1, C))

        def low_rank(rank: Any) -> tuple[nn.Parameter, nn.Parameter]:
            return nn.Parameter(torch.empty(C, rank)), nn.Parameter(torch.empty(rank, C))

        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (vector() for _ in "rwkvag")
        self.w0, self.w1, self.w2 = vector(), *low_rank(config.decay_rank)
        self.a0, self.a1, self.a2 = vector(), *low_rank(config.iclr_rank)
        self.v0, self.v1, self.v2 = vector(), *low_rank(config.value_rank)
        self.g1, self.g2 = low_rank(config.gate_rank)
        self.k_k, self.k_a = vector(), vector()
        self.r_k = nn.Parameter(torch.empty(H, N))
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.ln_x = nn.GroupNorm(H, C, eps=GROUP_NORM_EPS)

    @property
    def mixes(self) -> list[Tensor]:
        """How much of the token before is in each of the six inputs, (1, 1, C)."""
        return [self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g]

    def forward(
        self,
        begin: Callable[..., tuple[Tensor, list[Tensor], Tensor]],
        x: Tensor,
        branch: Tensor | None,
        last: Tensor | None,
        wkv_state: Tensor | None,
        v_first: Tensor | None,
        cu_seqlens: Tensor | None = None,
        span: Span | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Mix along time.

        Args:
            begin: :func:`heron.model.shift.normed_and_mixed` with ln1. Not ln1 itself: accelerate moves what a module
                is called with.
            x, branch: (B, T, C), the residual stream in two parts; see :meth:`heron.model.rwkv.Block.forward`.
            last: (n_seq, C), the normed token before each sequence; None: zeros.
            wkv_state: (n_seq, H, N, N) fp32; None: zeros.
            v_first: (B, T, C), layer 0's values; None in layer 0.
            cu_seqlens: where packed sequences begin; see :func:`heron.ops.wkv7`. None: n_seq is B.
            span: the tokens are a span of a longer text (:mod:`heron.ops.spans`); `begin` knows it, too.

        Returns:
            The residual stream x + branch, what time mixing has to add to it (B, T, C), the new last, the new
            wkv_state, and v_first for the layers above.
        """
        x, mixed, last = begin(x, branch, self.mixes, last, cu_seqlens)
        x_r, x_w, x_k, x_v, x_a, x_g = mixed
        v = self.value(x_v)
        inputs = HeadInputs(
            r=self.receptance(x_r).to(x_r.dtype),  # which under autocast is more than that of products
            w=torch.tanh(x_w @ self.w1) @ self.w2,
            k=self.key(x_k),
            v=v,
            iclr=(x_a @ self.a1) @ self.a2,
            gate=torch.sigmoid(x_g @ self.g1) @ self.g2,
            value=None if v_first is None else (x_v @ self.v1) @ self.v2,
            v_first=v_first,
        )
        y, wkv_state = self.mix_heads(inputs, self.head_weights(v_first is not None), wkv_state, cu_seqlens, span)
        return x, self.output(y), last, wkv_state, v if v_first is None else v_first

    def mix_heads(
        self,
        inputs: HeadInputs,
        weights: HeadWeights,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        span: Span | None,
    ) -> tuple[Tensor, Tensor]:
        """What lies between the projections: :func:`heron.ops.head_mix`."""
        if is_plain(self.ln_x, nn.GroupNorm):
            return ops.head_mix(inputs, weights, state, cu_seqlens, span=span)
        return head_mix_reference(inputs, weights, state, cu_seqlens, self.ln_x, span)  # a kernel would not call it

    def head_weights(self, mixes_v_first: bool) -> HeadWeights:
        """The weights of single channels, as ops.head_mix and ops.head_step take them."""
        norm = self.ln_x
        affine: tuple[Any, ...] = (
            (norm.weight, norm.bias, norm.eps) if is_plain(norm, nn.GroupNorm) else (None, None, 0.0)
        )
        return HeadWeights(
            w0=self.w0,
            a0=self.a0,
            k_k=self.k_k,
            k_a=self.k_a,
            r_k=self.r_k,
            norm_weight=affine[0],
            norm_bias=affine[1],
            eps=affine[2],
            v0=self.v0 if mixes_v_first else None,
        )
