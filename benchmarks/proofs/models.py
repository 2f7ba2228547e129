"""The networks that the proofs compare: RWKV-7 as it is and with larger rates, and two controls of the same blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from heron import RWKV, ModelConfig
from heron.errors import ConfigError
from heron.model.attention import FirstAttention, attend
from heron.model.state import State
from heron.model.time_mix import TimeMix
from heron.ops.head_mix import HeadInputs, HeadWeights, head_mix_reference
from heron.ops.spans import Span

MODELS = ("rwkv7", "signed", "decay-only", "attention")
_CLOSED = -40.0  # sigmoid gives 4e-18
_NEAR_REFLECTIONS = 2.0  # added to logits of in-context learning rates: with 1.7 of 2, an eigenvalue of -0.7
_SLOWER = 3.0  # taken off decay logits


def build(name: str, config: ModelConfig, length: int, carries: bool = False) -> RWKV:
    """A model with fresh initial values, for samples of up to `length` tokens; one that `carries` is a
    :class:`CarryingRWKV`.

    * "rwkv7" is :class:`heron.RWKV`.
    * "signed" has in-context learning rates up to 2, not 1: what is removed may come back with the opposite sign. They
      are one a head, and what is removed is so before the state decays: else a state may grow with each reflection, and
      ends beyond what fp32 holds. It starts with high rates and slow decay.
    * "decay-only" never removes what its state holds under a key: the state fades and is added to, as in RWKV-6.
    * "attention" has causal softmax attention in the place of time mixing, and so many hidden channels more that it is
      of the same size.

    Raises:
        ConfigError: no such model, or attention that shall carry states, of which it has none.
    """
    if carries and name == "attention":
        raise ConfigError("model: attention has no state to carry; wanted another for a task of several pieces")
    model = CarryingRWKV(config) if carries else RWKV(config)
    if name == "decay-only":
        for block in model.blocks:
            _decay_only(block.att)
    elif name == "signed":
        for layer, block in enumerate(model.blocks):
            block.att = _signed(block.att, config, layer)
    elif name == "attention":
        with torch.device("meta"):
            spare = _size(TimeMix(config, 1)) - _size(CausalAttention(config, length))
        model = RWKV(config.changed(ffn_dim=config.ffn_dim + spare // (2 * config.n_embd)))
        for block in model.blocks:
            block.att = CausalAttention(config, length)
    elif name != "rwkv7":
        raise ConfigError(f"model: wanted one of {', '.join(MODELS)}, got {name!r}")
    return model


class CarryingRWKV(RWKV):
    """A network whose :meth:`loss` goes on from the states that the last one left, until it is told to forget them.

    No gradient flows into these. They stay where they are in memory, so that a pass can be replayed from a graph.
    """

    _carried: State | None = None

    def forget(self, n_seq: int) -> None:
        """Begin `n_seq` new samples with the next loss; their number stays the same."""
        if self._carried is None:
            weight = self.head.weight
            self._carried = State.zeros(self.config, n_seq, weight.device, weight.dtype).clone()
        self._carried.map(Tensor.zero_)

    def loss(self, tokens: Tensor, targets: Tensor, *_: Any, **__: Any) -> Tensor:
        """See :meth:`heron.RWKV.loss`, of which the first two arguments are taken."""
        assert self._carried is not None, "forget() comes before the first loss"
        hidden, state = self.hidden_states(tokens, self._carried.clone())
        assert isinstance(state, State)
        with torch.no_grad():
            for old, new in zip(self._carried.to_list(), state.to_list(), strict=True):
                old.copy_(new)
        return self.head_loss(hidden, targets)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _decay_only(att: TimeMix) -> None:
    """Hold the in-context learning rate at 0, so that ``b = 0`` in WKV7; keys are used as they are projected."""
    with torch.no_grad():
        att.a0.fill_(_CLOSED)
        att.k_a.zero_()  # else k would be k (1 - k_a), almost 0 where training starts
    for frozen in (att.a0, att.a1, att.a2, att.k_k):
        frozen.requires_grad_(False)


def _signed(att: TimeMix, config: ModelConfig, layer: int) -> TimeMix:
    """A time mix whose in-context learning rate is doubled where it removes. It starts near reflections."""
    with torch.device("meta"):
        signed = SignedTimeMix(config, layer)
    signed.load_state_dict(att.state_dict(), assign=True)
    with torch.no_grad():
        signed.a0 += _NEAR_REFLECTIONS
        signed.w0 -= _SLOWER
    return signed


class SignedTimeMix(TimeMix):
    """A time mix whose transition is ``(I - rate kk kk^T) diag(decay)``, rate from 0 to 2: no state grows by it.

    It has no fused form.
    """

    def mix_heads(
        self,
        inputs: HeadInputs,
        weights: HeadWeights,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        span: Span | None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`heron.model.time_mix.TimeMix.mix_heads`."""
        return head_mix_reference(inputs, weights, state, cu_seqlens, self.ln_x, span, _signed_rates)


def _signed_rates(iclr: Tensor, decay_logits: Tensor) -> Tensor:
    """One rate a head, from 0 to 2, of a state that has decayed."""
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(decay_logits))
    return 2 * iclr.mean(dim=-1, keepdim=True) * decay


class CausalAttention(nn.Module):
    """Multi-head attention with the parameters of a time mix's four matrices, token shift, and learned positions.

    Scores are softly capped as in :class:`heron.model.attention.FirstAttention`. It has the interface of
    :class:`heron.model.time_mix.TimeMix` and no state: it is for whole samples.
    """

    def __init__(self, config: ModelConfig, length: int):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.x_q, self.x_k, self.x_v = (nn.Parameter(torch.zeros(1, 1, C)) for _ in "qkv")
        self.position = nn.Parameter(0.02 * torch.randn(length, C))
        self.query, self.key, self.value, self.output = (nn.Linear(C, C, bias=False) for _ in range(4))
        for matrix in (self.query, self.key, self.value):
            nn.init.orthogonal_(matrix.weight)
        nn.init.zeros_(self.output.weight)  # as in a time mix

    def forward(
        self,
        begin: Callable[..., tuple[Tensor, list[Tensor], Tensor]],
        x: Tensor,
        branch: Tensor | None,
        last: Tensor | None,
        wkv_state: Tensor | None,
        v_first: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """See :meth:`heron.model.time_mix.TimeMix.forward`; `wkv_state` and `v_first` are handed on."""
        x, mixed, last = begin(x, branch, [self.x_q, self.x_k, self.x_v], last, None)
        B, T, C = x.shape
        x_q, x_k, x_v = mixed
        position = self.position[:T]
        q, k, v = self.query(x_q + position), self.key(x_k + position), self.value(x_v)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2).flatten(0, 1) for part in (q, k, v))
        y = attend(q, k, v, FirstAttention.CAP).view(B, self.n_head, T, -1).transpose(1, 2).reshape(B, T, C)
        return x, self.output(y), last, wkv_state, v_first
