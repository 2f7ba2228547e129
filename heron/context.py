"""Context parallelism: the processes of a group read one text together, each a span of its tokens.

Every process has the whole model. Between the spans go, in each layer, the two tokens at each border that token shift
mixes, and what a span does to the WKV state (:mod:`heron.ops.wkv7.span`); all else is a matter of single tokens. A step
is, on every process of the group::

    part = context.part(tokens, targets)                     # of the whole text, the same on all
    loss = model.loss(part.tokens, part.targets, part.cu_seqlens, span=part.span) * part.share
    loss.backward()                                          # then add up loss and gradients over the group
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from heron.config import ModelConfig
from heron.errors import ConfigError, DataError
from heron.ops import spans
from heron.ops.spans import Chain, Span


class Part(NamedTuple):
    """What one process of a group computes of a text."""

    tokens: Tensor  # (B, its T)
    targets: Tensor  # (B, its T)
    cu_seqlens: Tensor | None  # of the packed sequences that have tokens here, then empty ones: as many as of the text
    span: Span
    share: float  # of the text's counted targets; times it, losses and gradients of all parts add up to the text's


def why_not(config: ModelConfig) -> str | None:
    """Why a model can't read a text in spans, as a clause; None where it can."""
    if config.memory is not None or config.rosa is not None:
        return "ROSA looks for matches in the whole text"
    if config.has_attention:
        return f"the attention of {config.variant} looks back over the whole text"
    return None


class Context:
    """The processes that share a text, and this one's place among them.

    Args:
        group: in the order of the text, of at least one process; None: all processes. It lives until :meth:`close`.

    Attributes:
        index, size: of this process in the group, and how many it has.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = dist.group.WORLD if group is None else group
        self.index, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)
        assert self._group is not None
        self._name = self._group.group_name
        spans.CHAINS[self._name] = Chain(self.index, self.size, self._gather)

    def close(self) -> None:
        """Let go of the group; spans of it can be computed no more."""
        spans.CHAINS.pop(self._name, None)

    def _gather(self, x: Tensor) -> Tensor:
        everyone = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(everyone.unbind()), x.contiguous(), group=self._group)
        return everyone

    def part(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None, cuts: Sequence[int] | None = None
    ) -> Part:
        """:func:`part_of` this process."""
        return part_of(self._name, tokens, targets, cu_seqlens, cuts)


def part_of(
    name: str, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None, cuts: Sequence[int] | None = None
) -> Part:
    """What the holder of a chain computes of a text, or of each of B texts.

    Args:
        name: of its chain in :mod:`heron.ops.spans`.
        tokens, targets: (B, T), the same for all holders; on the CPU, so that counting makes no GPU wait.
        cu_seqlens: (n_seq + 1,), packed sequences with B = 1; on the CPU.
        cuts: where the spans begin, then T: numbers that increase from 0. None: equal spans, but for one token.

    Raises:
        DataError: fewer tokens than spans.
        ConfigError: `cuts` that do not fit.
    """
    index, size, _ = spans.CHAINS[name]
    n_tokens = tokens.shape[1]
    if n_tokens < size:
        raise DataError(f"tokens: {size} processes share them, wanted at least one each, got {n_tokens}")
    if cuts is None:
        cuts = [n_tokens * i // size for i in range(size + 1)]
    fits = len(cuts) == size + 1 and cuts[0] == 0 and cuts[-1] == n_tokens
    if not fits or any(begin >= end for begin, end in pairwise(cuts)):
        raise ConfigError(f"cuts: wanted {size + 1} numbers from 0 up to {n_tokens}, got {list(cuts)}")
    begin, end = cuts[index], cuts[index + 1]
    edges, offsets = (None, None) if cu_seqlens is None else _packed(cu_seqlens, begin, end)
    counted = (targets != -100).sum(dim=0)
    share = int(counted[begin:end].sum()) / max(int(counted.sum()), 1)
    return Part(tokens[:, begin:end], targets[:, begin:end], offsets, Span(name, edges), share)


def _packed(cu_seqlens: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Span.edges of tokens `begin` to `end`, and the cu_seqlens of what is packed there."""
    offsets = cu_seqlens.tolist()
    inside = sorted({offset - begin for offset in offsets if begin < offset < end})
    local = [0, *inside, end - begin]
    padding = [end - begin] * (len(offsets) - len(local))
    edges = torch.tensor([begin not in offsets, local[1], local[-2], len(inside)])
    return edges, cu_seqlens.new_tensor(local + padding)
