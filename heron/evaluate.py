"""How well a model predicts a text: loss in nats per token, perplexity, bits per byte."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from heron import ops
from heron.errors import ConfigError, DataError
from heron.model import RWKV

_TOKENS_PER_PASS = 4096


class Evaluation(NamedTuple):
    """The outcome of :func:`evaluate`."""

    loss: float  # mean negative log-likelihood of a target, in nats
    n_targets: int
    bits_per_byte: float | None  # None where the text behind the tokens is unknown

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def evaluate(
    model: RWKV, tokens: np.ndarray, ctx_len: int, n_bytes: int | None = None, autocast: torch.autocast | None = None
) -> Evaluation:
    """Score every token but the first, once, in windows of `ctx_len` that each start from a zero state.

    Args:
        model: any RWKV; its mode and gradients are left alone.
        tokens: 1-D array of ids.
        ctx_len: tokens of one window.
        n_bytes: UTF-8 bytes that tokens[1:] stand for.
        autocast: the precision context of the training run, if any.

    Raises:
        ConfigError: a ctx_len below 1.
        DataError: fewer than two tokens.
    """
    if ctx_len < 1:
        raise ConfigError(f"ctx_len: wanted at least 1, got {ctx_len}")
    n_targets = len(tokens) - 1
    if n_targets < 1:
        raise DataError(f"evaluate: wanted at least 2 tokens, got {len(tokens)}")
    device = next(model.parameters()).device
    full = n_targets // ctx_len
    inputs = np.asarray(tokens[: full * ctx_len], dtype=np.int64).reshape(full, ctx_len)
    targets = np.asarray(tokens[1 : full * ctx_len + 1], dtype=np.int64).reshape(full, ctx_len)
    rows = max(1, _TOKENS_PER_PASS // ctx_len)
    passes = [(inputs[i : i + rows], targets[i : i + rows]) for i in range(0, full, rows)]
    if n_targets % ctx_len:
        tail = np.asarray(tokens[full * ctx_len :], dtype=np.int64)[None]
        passes.append((tail[:, :-1], tail[:, 1:]))

    total = 0.0
    with torch.no_grad(), autocast or torch.autocast(device.type, enabled=False):
        for x, y in passes:
            total += _nll(model, torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
    bits = total / math.log(2) / n_bytes if n_bytes else None
    return Evaluation(total / n_targets, n_targets, bits)


def _nll(model: RWKV, x: Tensor, y: Tensor) -> float:
    """Summed negative log-likelihood of the targets y (B, T) after the inputs x (B, T)."""
    hidden, _ = model.hidden_states(x)
    return float(ops.linear_cross_entropy(hidden, model.head.weight, y).double() * y.numel())
