"""ROSA layers: signs become symbols, the longest suffix of them that occurred before is found, what followed comes out.

The match is exact and has no parameters (:func:`heron.ops.rosa`); learning shapes the symbols that go in and the
vectors that come out. docs/rosa.md has the rules. Source: BlinkDL/RWKV-LM, folder RWKV-v8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from heron import ops
from heron.config import RosaConfig
from heron.model.state import RosaState
from heron.ops._graph import in_graph
from heron.ops.rosa import rosa_last
from heron.ops.rosa.gradients import rosa_emb01, rosa_qkv, to_streams
from heron.ops.shift_mix import shifted


class RosaEmbed(nn.Module):
    """The token form: the row of the token that is predicted, zeros where none is; the rows alone learn."""

    def __init__(self, vocab_size: int, n_embd: int, rosa: RosaConfig):
        super().__init__()
        self.rosa = rosa
        self.emb = nn.Embedding(vocab_size, n_embd)

    def start(self, batch_size: int) -> RosaState:
        """What it remembers before the first token."""
        return RosaState.empty(batch_size, 1, 1, self.emb.weight.device, None)

    def forward(self, ids: Tensor, state: RosaState) -> tuple[Tensor, RosaState]:
        """ids (B, T) int64 -> rows (B, T, C), and the new state."""
        predicted, state = follow(ids[:, None, None], state, self.rosa.max_match)
        predicted = predicted[:, 0]  # (B, T)
        return self.emb(predicted.clamp(min=0)) * (predicted >= 0).unsqueeze(-1), state


class Rosa01Layer(nn.Module):
    """The self form: the signs of x predict themselves, and emb1 or emb0 comes out by the predicted bit."""

    def __init__(self, n_embd: int, rosa: RosaConfig):
        super().__init__()
        self.rosa = rosa
        self.emb0 = nn.Parameter(torch.full((1, 1, n_embd), -1e-5))
        self.emb1 = nn.Parameter(torch.full((1, 1, n_embd), 1e-5))

    def start(self, batch_size: int) -> RosaState:
        """What it remembers before the first token."""
        return RosaState.empty(batch_size, 1, self.emb0.shape[-1] // self.rosa.bits, self.emb0.device, None)

    def forward(self, x: Tensor, state: RosaState) -> tuple[Tensor, RosaState]:
        """x (B, T, C), the residual stream itself -> what is to be added to it (B, T, C), and the new state."""
        emb0, emb1 = self.emb0.view(-1), self.emb1.view(-1)

        def layer(x: Tensor, **options) -> Tensor:
            return rosa_emb01(x, emb0, emb1, **options)

        out, state = recall((x,), state, self.rosa, emb1, emb0, layer)
        return out.to(x.dtype), state


class RosaLevel(nn.Module):
    """What a 1 puts out, (1, 1, C), under upstream's name. It is called, so that hooks on this module fire."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.emb = nn.Parameter(torch.ones(1, 1, n_embd))

    def forward(self) -> Tensor:
        return self.emb


class RosaQKV(nn.Module):
    """The QKV form: signs of q look for themselves in those of k; the sign of v that came next chooses e or -e.

    Parameter names and shapes are those of the upstream files.
    """

    def __init__(self, n_embd: int, rosa: RosaConfig):
        super().__init__()
        self.rosa = rosa
        if rosa.token_shift:
            self.x_q, self.x_k, self.x_v = (nn.Parameter(torch.zeros(1, 1, n_embd)) for _ in "qkv")
        self.q, self.k, self.v, self.o = (nn.Linear(n_embd, n_embd, bias=rosa.proj_bias) for _ in "qkvo")
        self.rosa_qkv = RosaLevel(n_embd)

    def forward(self, x: Tensor, state: RosaState) -> tuple[Tensor, RosaState]:
        """x (B, T, C), the output of ln3 -> the branch's output (B, T, C), and the new state."""
        mixed = [x, x, x]
        if self.rosa.token_shift:
            before, last = shifted(x, state.shift)
            delta = before - x
            mixed = [torch.addcmul(x, delta, mix.to(x.dtype)) for mix in (self.x_q, self.x_k, self.x_v)]
            state = state._replace(shift=last)
        q, k, v = (project(x) for project, x in zip((self.q, self.k, self.v), mixed, strict=True))
        e = self.rosa_qkv().view(-1)

        def layer(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
            return rosa_qkv(q, k, v, e, **options)

        out, state = recall((q, k, v), state, self.rosa, e, -e, layer)
        return self.o(out.to(x.dtype)), state


def recall(
    inputs: tuple[Tensor, ...],
    state: RosaState,
    rosa: RosaConfig,
    high: Tensor,
    low: Tensor,
    layer: Callable[..., Tensor],
) -> tuple[Tensor, RosaState]:
    """One ROSA layer on what follows `state`.

    With autograd on, or where a graph is recorded, `layer` runs over the whole history, in which what came before has
    no gradient. With autograd off the same numbers come from the match alone, of which a single token is one step.

    Args:
        inputs: (B, T, C) each: q, k, v, or the one that is all three. A bit is ``> 0``, so 0 and NaN are bit 0.
        high, low: (C,), what a 1 and a 0 put out.
        layer: differentiable, of `inputs` and the options of `rosa`.

    Returns:
        (B, T, C) in the dtype of `high`, and the new state.
    """
    B, T, C = inputs[0].shape
    symbols = torch.stack([to_streams(x, rosa.bits).view(B, -1, T) for x in inputs], dim=1)  # (B, 3 or 1, G, T)
    if torch.is_grad_enabled() or in_graph():  # where nothing can be looked at, `layer` is one operator
        past = (2.0 * _bits(kind, rosa.bits) - 1 for kind in state.symbols.unbind(1))  # (B, t, C), of these signs
        whole = [torch.cat((before.to(x.dtype), x), dim=1) for before, x in zip(past, inputs, strict=True)]
        options = dict(bits=rosa.bits, no_match=rosa.no_match, max_match=rosa.max_match, grad=rosa.grad)
        seen = torch.cat((state.symbols, symbols), dim=3)
        return layer(*whole, **options)[:, -T:], state._replace(symbols=seen, lengths=None)

    following, state = follow(symbols, state, rosa.max_match)
    out = torch.where(_bits(following, rosa.bits), high, low)  # (B, T, C)
    nothing = low if rosa.no_match == "bit0" else torch.zeros_like(low)
    is_matched = (following >= 0).transpose(1, 2).repeat_interleave(rosa.bits, dim=2)
    return torch.where(is_matched, out, nothing), state


def follow(symbols: Tensor, state: RosaState, max_match: int | None) -> tuple[Tensor, RosaState]:
    """What followed the longest match at each of T new tokens.

    Args:
        symbols: (B, 3, G, T): queries, keys, values; (B, 1, G, T) where they are one.
        state: of the t tokens before.

    Returns:
        (B, G, T) int64 symbols, -1 for no match; the state of all t + T tokens.
    """
    B, _, G, T = symbols.shape
    seen = torch.cat((state.symbols.to(symbols.dtype), symbols), dim=3)
    q, k, v = (kind.flatten(0, 1) for kind in seen.expand(-1, 3, -1, -1).unbind(1))  # (B * G, t + T)
    if T == 1:
        lengths = None if state.lengths is None else state.lengths.flatten(0, 1)
        src, lengths = rosa_last(q, k, lengths, max_match)
        src, lengths = src.unsqueeze(1), lengths.view(B, G, -1)
    else:
        src, lengths = ops.rosa(q, k, max_match)[0][:, -T:], None
    following = torch.where(src < 0, -1, v.gather(1, src + 1).long())
    return following.view(B, G, T), state._replace(symbols=seen, lengths=lengths)


def _bits(symbols: Tensor, bits: int) -> Tensor:
    """(B, G, T) symbols -> (B, T, G * bits) bool, the least significant bit first."""
    each = symbols.transpose(1, 2).unsqueeze(-1) >> torch.arange(bits, dtype=symbols.dtype, device=symbols.device) & 1
    return each.flatten(2) != 0
