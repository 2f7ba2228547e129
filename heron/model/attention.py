"""DeepEmbedAttention (DEA): one extra softmax head per layer, whose cache is 64 values a token.

Keys and values are kept as low-rank codes, blown up when they are read, and gated by a row per token. Equations:
BlinkDL/RWKV-LM, RWKV-v7/rwkv_v8_rc00_hybrid_demo.py (first form) and rwkv_v7b_demo.py (second form).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heron.config import ModelConfig
from heron.model.deep_embed import DeepEmbed, Lookup, rows
from heron.model.state import DEA_RANK, DEA_WIDTH, AttentionState
from heron.ops.shift_mix import shifted

QUERIES_AT_ONCE = 512  # so that the scores of a long text are never held all at once


class FirstAttention(nn.Module):
    """DEA of the v8-hybrid. Parameter names and shapes are those of the upstream files."""

    CAP = 32.0

    def __init__(self, config: ModelConfig):
        super().__init__()
        V, C = config.vocab_size, config.n_embd
        self.qq = nn.Linear(C, DEA_WIDTH, bias=False)
        self.kk = nn.Linear(C, DEA_RANK, bias=False)
        self.kkup = nn.Linear(DEA_RANK, DEA_WIDTH, bias=False)
        self.ennk = DeepEmbed(V, DEA_WIDTH)
        self.vv = nn.Linear(C, DEA_RANK, bias=False)
        self.vvup = nn.Linear(DEA_RANK, C, bias=False)
        self.emm = DeepEmbed(V, C)
        self.lnq = nn.LayerNorm(DEA_WIDTH)
        self.lnk = nn.LayerNorm(DEA_WIDTH)
        self.lnv = nn.LayerNorm(C)

    def forward(
        self, x: Tensor, state: AttentionState, context: Lookup, window: int | None
    ) -> tuple[Tensor, AttentionState]:
        """Look back over the context.

        Args:
            x: (B, T, C), the residual stream itself, before ln1.
            state: the codes of the t tokens before, (B, t, 32) each.
            context: all S = t + T tokens.
            window: how many tokens a query sees, itself included; None: all.

        Returns:
            The branch's output (B, T, C) and the state with the codes of all S tokens.
        """
        k_codes = torch.cat((state.k_codes, self.kk(x).to(state.k_codes.dtype)), dim=1)  # (B, S, 32)
        v_codes = torch.cat((state.v_codes, self.vv(x).to(state.v_codes.dtype)), dim=1)
        k = self.kkup(k_codes)  # (B, S, 256)
        v = torch.tanh(self.vvup(v_codes))  # (B, S, C)
        q = self.lnq(self.qq(x))  # (B, T, 256)
        k = self.lnk(k * self.ennk(context.ids).to(k.dtype))
        v = self.lnv(v * self.emm(context.ids).to(v.dtype))
        return attend(q, k, v, self.CAP, window), AttentionState(k_codes, v_codes, None)


class SecondAttention(nn.Module):
    """DEA of v7b: queries, keys and values are shifted by a token, and the rows also depend on the embedding."""

    CAP = 64.0

    def __init__(self, config: ModelConfig):
        super().__init__()
        V, C = config.vocab_size, config.n_embd
        self.qq = nn.Linear(C, DEA_WIDTH, bias=False)
        self.k1 = nn.Parameter(torch.empty(C, DEA_RANK))
        self.k2 = nn.Parameter(torch.empty(DEA_RANK, DEA_WIDTH))
        self.k_emb = DeepEmbed(V, DEA_WIDTH)
        self.k_emb_x = nn.Linear(C, DEA_WIDTH, bias=False)
        self.v1 = nn.Parameter(torch.empty(C, DEA_RANK))
        self.v2 = nn.Parameter(torch.empty(DEA_RANK, C))
        self.v_emb = DeepEmbed(V, C)
        self.v_emb_x = nn.Linear(C, C, bias=False)
        self.x_q = nn.Parameter(torch.empty(DEA_WIDTH))
        self.x_k = nn.Parameter(torch.empty(DEA_WIDTH))
        self.x_v = nn.Parameter(torch.empty(C))
        self.lnq = nn.LayerNorm(DEA_WIDTH)
        self.lnk = nn.LayerNorm(DEA_WIDTH)
        self.lnv = nn.LayerNorm(C)

    def forward(
        self, x: Tensor, state: AttentionState, context: Lookup, window: int | None
    ) -> tuple[Tensor, AttentionState]:
        """As :meth:`FirstAttention.forward`; the state also holds the last query, before shift and norm."""
        k_codes = torch.cat((state.k_codes, (x @ self.k1).to(state.k_codes.dtype)), dim=1)  # (B, S, 32)
        v_codes = torch.cat((state.v_codes, (x @ self.v1).to(state.v_codes.dtype)), dim=1)
        q = self.qq(x)  # (B, T, 256)
        k = k_codes @ self.k2  # (B, S, 256)
        v = torch.tanh(v_codes @ self.v2)  # (B, S, C)
        k = k * rows(self.k_emb, self.k_emb_x, context).to(k.dtype)
        v = v * rows(self.v_emb, self.v_emb_x, context).to(v.dtype)
        q, last_query = _mixed(q, state.last_query, self.x_q)
        k, _ = _mixed(k, None, self.x_k)  # nothing precedes the first token of a context
        v, _ = _mixed(v, None, self.x_v)
        new = AttentionState(k_codes, v_codes, last_query.to(state.k_codes.dtype))
        return attend(self.lnq(q), self.lnk(k), self.lnv(v), self.CAP, window), new


def attend(q: Tensor, k: Tensor, v: Tensor, cap: float, window: int | None = None) -> Tensor:
    """Causal attention with softly capped scores: ``softmax over j <= t of cap * tanh(q k^T / (16 cap))``, times v.

    Args:
        q: (B, T, 256), the queries of the last T of S positions.
        k: (B, S, 256).
        v: (B, S, C).
        cap: no score is larger; the softmax follows.
        window: only the last `window` positions up to each query count; None: all.

    Returns:
        (B, T, C). The backward computes the scores again, so memory grows with S, not with T * S.
    """
    B, T, D = q.shape
    S = k.shape[1]
    scale = 1 / (D**0.5 * cap)

    def piece(q: Tensor, k: Tensor, v: Tensor, first: int, start: int) -> Tensor:
        """Queries at positions `first`, first + 1, ... on keys from position `start` on."""
        scores = cap * torch.tanh((q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale)
        distance = _positions(first, q) - _positions(start, k).T  # (n queries, n keys)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).to(v.dtype) @ v

    if not isinstance(T, int):  # exported for any T: a graph has no loop
        return piece(q, k, v, S - T, 0)
    out = []
    for first in range(S - T, S, QUERIES_AT_ONCE):
        end = min(first + QUERIES_AT_ONCE, S)
        start = 0 if window is None else max(0, first + 1 - window)
        queries = q[:, first - (S - T) : end - (S - T)]
        arguments = (queries, k[:, start:end], v[:, start:end], first, start)
        recompute = torch.is_grad_enabled() and T > QUERIES_AT_ONCE
        out.append(checkpoint(piece, *arguments, use_reentrant=False) if recompute else piece(*arguments))
    return torch.cat(out, dim=1)


def _positions(first: int, x: Tensor) -> Tensor:
    """first, first + 1, ... for each token of x (B, n, ...), as a column (n, 1)."""
    return torch.arange(first, first + x.shape[1], device=x.device).unsqueeze(1)


def _mixed(x: Tensor, last: Tensor | None, mix: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, T, D) with `mix` (D,) of the step to the token before, and its last token.

    `last` (B, D) stands before the first one; None: zeros.
    """
    before, new_last = shifted(x, last)
    return torch.addcmul(x, before - x, mix.to(x.dtype)), new_last
