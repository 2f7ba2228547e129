"""What a caller hands to a model, checked: ids of tokens and targets, where packed sequences begin. Ids looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from heron.config import RosaConfig
from heron.errors import ConfigError, DataError
from heron.model.plain import holds_tensors, is_plain
from heron.ops._graph import in_graph
from heron.ops.rows import look_up

if TYPE_CHECKING:
    import numpy as np


def integers(name: str, ids: Tensor | Sequence | np.ndarray, emb: nn.Module) -> Tensor:
    """(B, T) int64 ids, from a tensor, or from a list or an array to where `emb` is; DataError for what is none."""
    if not isinstance(ids, Tensor):
        try:
            ids = torch.as_tensor(ids, device=next(emb.parameters()).device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{name}: wanted (B, T) integer ids, got {type(ids).__name__}: {error}") from None
    if not ids.numel():
        return ids  # and its shape will be refused
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise DataError(f"{name}: wanted int64 ids, got {ids.dtype}")
    return ids.long()


def checked_tokens(tokens: Tensor | Sequence | np.ndarray, vocab_size: int, emb: nn.Module) -> Tensor:
    """:func:`integers` below `vocab_size`, at least one; DataError for any others."""
    tokens = integers("tokens", tokens, emb)
    if tokens.dim() != 2 or tokens.numel() == 0:
        one = "; of one sequence, give [tokens] or tokens.unsqueeze(0)" if tokens.dim() == 1 else ""
        raise DataError(f"tokens: wanted (B, T) with B, T >= 1, got {tuple(tokens.shape)}{one}")
    # On a GPU this would wait for the device; the data loader has checked every id by then.
    if tokens.device.type == "cpu" and not in_graph():
        low, high = torch.aminmax(tokens)
        if low < 0 or high >= vocab_size:
            raise DataError(
                f"tokens: ids must be 0 to {vocab_size - 1} (vocab_size {vocab_size}), got {int(low)} to {int(high)}"
            )
    return tokens


def checked_offsets(cu_seqlens: Tensor | Sequence[int] | np.ndarray, tokens: Tensor) -> Tensor:
    """Where packed sequences begin, as a tensor; the host does not wait for a GPU to look at the numbers."""
    if not isinstance(cu_seqlens, Tensor):
        try:
            cu_seqlens = torch.as_tensor(cu_seqlens, device=tokens.device)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(cu_seqlens).__name__
            raise ConfigError(f"cu_seqlens: wanted n_seq + 1 whole numbers, got {kind}: {error}") from None
    fits = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] > 1 and cu_seqlens.dtype in (torch.int32, torch.int64)
    if not fits or tokens.shape[0] != 1 or cu_seqlens.device != tokens.device:
        raise ConfigError(
            f"cu_seqlens: wanted (n_seq + 1,) int32 or int64 on {tokens.device}, and tokens (1, T); got "
            f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype} on {cu_seqlens.device}, tokens {tuple(tokens.shape)}"
        )
    if cu_seqlens.device.type == "cpu" and not in_graph():
        ends_right = int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == tokens.shape[1]
        if not ends_right or bool((cu_seqlens.diff() < 0).any()):
            raise ConfigError(
                f"cu_seqlens: wanted numbers from 0 to T = {tokens.shape[1]} that never decrease, "
                f"got {cu_seqlens.tolist()}"
            )
    return cu_seqlens


def check_recalled(recalled: Tensor, tokens: Tensor, vocab_size: int, memory: RosaConfig) -> None:
    """ConfigError unless `recalled` is what a ROSA memory of this kind may have found for (B, T) ids."""
    wanted = (*tokens.shape, memory.n_matches, 2)
    if tuple(recalled.shape) != wanted or recalled.dtype != torch.int64:
        raise ConfigError(f"recalled: wanted {wanted} int64, got {tuple(recalled.shape)} {recalled.dtype}")
    if recalled.device.type == "cpu" and not in_graph():
        most = torch.tensor((vocab_size - 1, memory.max_match))
        if ((recalled < 0) | (recalled > most)).any():
            raise ConfigError(f"recalled: wanted ids to {most[0]} and lengths to {most[1]}, got others")


class Embedding(nn.Embedding):
    """Rows of ids, whose gradients :func:`heron.ops.rows.look_up` sums. Its hooks are called: it may be sharded."""

    def forward(self, ids: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return look_up(ids, self.weight) if holds_tensors(self) else super().forward(ids)


def looked_up(emb: nn.Module, ids: Tensor) -> Tensor:
    """The rows (..., C) of ids (...), by :class:`Embedding` where PyTorch's own stands in its place."""
    return look_up(ids, emb.weight) if is_plain(emb, nn.Embedding) else emb(ids)
