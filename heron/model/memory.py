"""ROSA memory: what followed the longest earlier matches of the tokens read so far, at the input and at the output.

The match has no parameters, so it is found outside the network, once (:class:`heron.ops.rosa.TokenStream`). What was
found travels as one tensor, `recalled` (B, T, K, 2) int64: of each position K matches, the longest first, each with the
token that followed it and its length; 0 and 0 where there is none. docs/rosa.md has the rules.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from heron.config import ModelConfig, RosaConfig
from heron.errors import ConfigError, DataError
from heron.ops.rosa import TokenIndex, TokenStream
from heron.ops.rosa.device_stream import DeviceStream

MEMORY_BYTES = 12  # a token that is read; up to twice as much while the arrays have room to grow
_NO_TOKENS = torch.empty(0, dtype=torch.int64, device="cpu")  # also where this is imported under another device
_EXACT = 16  # lengths that have a row of their own; longer ones share one up to each power of two


class RosaMemory(nn.Module):
    """The parameters of ROSA memory. All start at 0, where the network computes what it does without.

    `compiled` stands in for what is written here where gradients are wanted; :mod:`heron.model.compiled` sets it.
    """

    compiled: Entries | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        rosa = config.memory
        if rosa is None or rosa.max_match is None:
            raise ConfigError("memory: the config has none")
        K, C, n_rows = rosa.n_matches, config.n_embd, n_length_rows(rosa.max_match)
        self.scale = nn.Parameter(torch.empty(K, C))
        self.length = nn.Parameter(torch.empty(K, n_rows, C))
        self.copy = nn.Parameter(torch.empty(K, n_rows))

    def forward(self, lengths: Tensor, tokens: Tensor | None = None, predicted: Tensor | None = None) -> Tensor:
        """What the network begins with, (B, T, C)::

            emb(token)  +  sum over k with length > 0 of  emb(predicted) * scale[k] + length[k, row of the length]

        Args:
            lengths: (B, T, K).
            tokens: (B, T, C), the rows of emb of the tokens. None: what logits are raised by is wanted, (B, T, K),
                ``copy[k, row of the length]``, 0 for no match. All of it goes through this call, so that hooks fire.
            predicted: (K, B, T, C), those of what the matches predicted.
        """
        if tokens is None or predicted is None:
            return (_chosen(self.numbers(lengths), self.copy) * self.copy).sum(dim=-1)
        scale = self.scale.view(len(predicted), *(1,) * (predicted.dim() - 2), -1)
        scale = scale * (lengths.movedim(-1, 0) > 0).unsqueeze(-1)
        added = (predicted * scale.to(predicted.dtype)).sum(dim=0)
        added = added + _RowsOf.apply(self.numbers(lengths), self.length.to(predicted.dtype))
        return tokens + added.to(tokens.dtype)

    def begun(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """:meth:`forward` of (1 + K, B, T, C) rows, those of the tokens first."""
        return self._entries.begun(self, rows, lengths)

    def bonus(self, recalled: Tensor) -> tuple[Tensor, Tensor]:
        """The ids (B, T, K) whose logits are raised, and by how much: ``copy[k, row of the length]``, else 0."""
        ids, lengths = recalled.unbind(dim=-1)
        return ids, self._entries.values(self, lengths)

    def add_to(self, logits: Tensor, recalled: Tensor) -> Tensor:
        """logits (B, T, V) with the bonus."""
        ids, values = self.bonus(recalled)
        return logits.scatter_add(-1, ids, values.to(logits.dtype))

    def add_to_(self, logits: Tensor, recalled: Tensor) -> Tensor:
        """:meth:`add_to` in place, for logits without a gradient."""
        ids, values = self.bonus(recalled)
        return logits.scatter_add_(-1, ids, values.to(logits.dtype))

    @property
    def _entries(self) -> Entries:
        return WRITTEN if self.compiled is None or not torch.is_grad_enabled() else self.compiled

    def _begun(self, rows: Tensor, lengths: Tensor) -> Tensor:
        tokens, predicted = rows.split([1, len(rows) - 1])
        return self(lengths, tokens.squeeze(0), predicted)

    def _values(self, lengths: Tensor) -> Tensor:
        return self(lengths)

    def numbers(self, lengths: Tensor) -> Tensor:
        """The row that each of lengths (..., K) has in the tables, from 1 on; 0 for no match."""
        n_rows = self.copy.shape[1]
        numbers = lengths.clamp(max=min(n_rows, _EXACT))
        for shared in range(n_rows - _EXACT):
            numbers = numbers + (lengths > _EXACT << shared)
        return numbers


class _RowsOf(torch.autograd.Function):
    """Rows (..., C) of tables (K, rows, C) by their numbers (..., K), from 1 on, summed over K; 0 takes none.

    The gradient is a product: adding up rows by index would put all of a batch into a few sums.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(numbers: Tensor, tables: Tensor) -> Tensor:
        K, n_rows, _ = tables.shape
        place = (numbers - 1).clamp(min=0) + n_rows * torch.arange(K, device=numbers.device)
        return (tables.flatten(0, 1)[place] * (numbers > 0).unsqueeze(-1)).sum(dim=-2)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        numbers, tables = ctx.saved_tensors
        d_tables = _chosen(numbers, tables).flatten(-2).flatten(0, -2).mT @ d.flatten(0, -2)
        return None, d_tables.view(tables.shape)


def _chosen(numbers: Tensor, tables: Tensor) -> Tensor:
    """(..., K, rows): 1 at the row of tables (K, rows, ...) that each of numbers (..., K) has, else 0; 0 has none."""
    of_rows = torch.arange(1, tables.shape[1] + 1, device=numbers.device)
    return (numbers.unsqueeze(-1) == of_rows).to(tables.dtype)


class Entries(NamedTuple):
    """What a memory computes at the input and at the output of the network, as written or compiled."""

    begun: Callable[[RosaMemory, Tensor, Tensor], Tensor]
    """As :meth:`RosaMemory.begun`."""
    values: Callable[[RosaMemory, Tensor], Tensor]
    """Lengths (..., K) -> what is added to the logits, (..., K)."""

    def compiled(self, by: Callable[[Callable], Callable]) -> Entries:
        """Both, each compiled by a function."""
        return Entries(by(self.begun), by(self.values))


WRITTEN = Entries(RosaMemory._begun, RosaMemory._values)


def n_length_rows(max_match: int) -> int:
    """Number of rows for lengths from 1 to `max_match`: 16, then one for 17 to 32, one for 33 to 64, and so on."""
    return max_match if max_match <= _EXACT else _EXACT + (max_match - 1).bit_length() - 4


def longest_match(n_rows: int) -> int:
    """The largest `max_match` that has so many rows; more than 2^8 - 1 is not to be had."""
    return n_rows if n_rows <= _EXACT else min(_EXACT << (n_rows - _EXACT), 255)


class Match(NamedTuple):
    """Where tokens occurred before, and what followed there."""

    predicted: int  # the id that followed
    length: int  # tokens; 0: there is no match
    back: int | None = None  # how many tokens before its next one a sequence has the predicted token; None: elsewhere
    position: int | None = None  # of the predicted token in an index of documents


class Documents:
    """A frozen index that memories look into beside what their sequences have read.

    Of a sequence and the documents together the K longest matches with different followers count; of equally long ones
    those in the sequence come first. Where documents end, matches do as the index was built. Of an index that tells
    matches of fewer tokens apart than the model, longer ones count as so long.

    Raises:
        ConfigError: a model without memory, an index of no tokens.
    """

    def __init__(self, index: TokenIndex, config: ModelConfig):
        max_match, (tokens, nodes, roots) = min(index.max_match, self.rules_of(config).max_match or 1), index.parts
        if not len(tokens):
            raise ConfigError("documents: this index holds no tokens")
        self._index = TokenIndex(tokens, nodes, roots, max_match, index.end)
        self._vocab_size = config.vocab_size
        self.n_before = max_match - 1  # tokens before those in question that are of use

    @property
    def hash(self) -> str:
        """32 hex digits of what is found in them: all of their tokens, and where matches end."""
        tokens, digest = self._index.parts[0], hashlib.blake2b(digest_size=16)
        digest.update(f"{tokens.dtype} {len(tokens)} {self._index.max_match} {self._index.end}\n".encode())
        digest.update(tokens.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @staticmethod
    def rules_of(config: ModelConfig) -> RosaConfig:
        """The memory of a model that is to look into documents; ConfigError where it has none."""
        if config.memory is None:
            raise ConfigError(
                "documents: this model has no ROSA memory to look into them; leave them out (--memory, --memory_from), "
                "or take a model that was trained with --rosa memory"
            )
        return config.memory

    def find(self, tokens: Tensor, n_last: int, n_found: int) -> tuple[Tensor, Tensor, Tensor]:
        """For the last `n_last` of (n,) ids of a sequence: followers, length, src, each (n_last, n_found) int64.

        Raises:
            DataError: an id that the model does not know.
        """
        followers, length, src = self._index.recall(tokens, n_last, n_found)
        if (followers >= self._vocab_size).any():
            raise DataError(
                f"documents: id {int(followers.max())} is in them, the model knows 0 to {self._vocab_size - 1}; build "
                "the index with the model's tokenizer"
            )
        return followers, length, src


def merged(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of matches found in two places, each as followers, length, src (n, K), the K longest with different followers.

    Of equally long ones those of `first` come first, then those that came first where they were found.

    Returns:
        followers, length, src, and which are of `second`, (n, K) each; 0, 0, -1 and False for none.
    """
    K = first[0].shape[1]
    followers, length, src = (torch.cat(parts, dim=1) for parts in zip(first, second, strict=True))
    length, order = length.sort(dim=1, descending=True, stable=True)
    followers, src = followers.gather(1, order), src.gather(1, order)
    seen = (followers.unsqueeze(2) == followers.unsqueeze(1)).tril(-1).any(dim=2)  # (n, 2 K): before, at no less length
    kept, places = ((length > 0) & ~seen).sort(dim=1, descending=True, stable=True)
    kept, places = kept[:, :K], places[:, :K]
    followers, length, src = (part.gather(1, places) for part in (followers, length, src))
    is_second = kept & (order.gather(1, places) >= K)
    return torch.where(kept, followers, 0), torch.where(kept, length, 0), torch.where(kept, src, -1), is_second


class Recollection:
    """The tokens that ROSA memory has read of one sequence. Reading on gives another one and leaves this as it is.

    The tokens lie in a stream that the recollections of one sequence share, in any thread. The newest reads on in it at
    O(log T) a token; an older one, such as a state that several texts begin with, reads its tokens again first.

    Args:
        tokens: (n,) ids, the last of those read; with a window the last ``window + max_match`` are enough. None: none.
        n_read: how many were read; None: these.
    """

    def __init__(self, tokens: Tensor | None = None, n_read: int | None = None):
        self._tokens = _NO_TOKENS if tokens is None else tokens
        self._n_read = n_read
        self._stream: TokenStream | None = None  # in which they were read

    @classmethod
    def _at_end_of(cls, stream: TokenStream) -> Recollection:
        memory = cls(n_read=len(stream))
        memory._stream = stream
        return memory

    def __reduce__(self) -> tuple[Any, ...]:
        return Recollection, (self.tokens(), self.n_read)

    @property
    def n_read(self) -> int:
        """Number of tokens read."""
        return len(self._tokens) if self._n_read is None else self._n_read

    def read(
        self, tokens: Tensor, rosa: RosaConfig, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor, Recollection]:
        """Read on, as `rosa` says.

        Args:
            tokens: (n,) ids on any device.
            documents: looked into as well.

        Returns:
            recalled (n, K, 2) on the device of `tokens`; where the matches end, (n, K) int64 positions in the sequence,
            -1 for none and for those in documents; and the recollection with `tokens`.

        Raises:
            KernelError: the memory has a window, and so much was read since that the tokens in it are gone: go on
                from a :meth:`clone`.
        """
        on_host = tokens.cpu()
        before = torch.empty(0) if documents is None else self.tokens(last=documents.n_before)
        with self._alone:
            stream = self._going_on(rosa)
            followers, length, src = stream.recall(on_host, rosa.n_matches)
        if documents is not None:
            theirs = documents.find(torch.cat((before, on_host)), len(on_host), rosa.n_matches)
            followers, length, src, is_theirs = merged((followers, length, src), theirs)
            src = torch.where(is_theirs, -1, src)
        recalled = torch.stack((followers, length), dim=-1).to(tokens.device)
        return recalled, src, Recollection._at_end_of(stream)

    def read_one(
        self, token: int, rosa: RosaConfig, documents: Documents | None = None
    ) -> tuple[list[Match], Recollection]:
        """:meth:`read` of one id, in microseconds: K matches, the longest first, and the recollection with it."""
        before = None if documents is None else self.tokens(last=documents.n_before)
        with self._alone:
            stream = self._going_on(rosa)
            found = stream.recall_one(token, rosa.n_matches)
        origin = [False] * rosa.n_matches
        if documents is not None and before is not None:
            mine = [torch.tensor([part]) for part in found]
            theirs = documents.find(torch.cat((before, torch.tensor([token]))), 1, rosa.n_matches)
            *found, origin = (part[0].tolist() for part in merged(mine, theirs))
        matches = [
            Match(predicted, length) if length == 0
            else Match(predicted, length, None, src + 1) if is_theirs
            else Match(predicted, length, self.n_read - src)
            for predicted, length, src, is_theirs in zip(*found, origin, strict=True)
        ]  # fmt: skip
        return matches, Recollection._at_end_of(stream)

    def on_device(self, rosa: RosaConfig, device: torch.device) -> DeviceStream:
        """A copy of its stream on a CUDA device, which reads on there; KernelError as :class:`DeviceStream`."""
        with self._alone:
            return DeviceStream(self._going_on(rosa), device)

    def _going_on(self, rosa: RosaConfig) -> TokenStream:
        """Under :attr:`_alone`: a stream that has read these tokens and no more, by the rules of `rosa`."""
        rules, stream = (rosa.max_match or 1, rosa.window, rosa.end), self._stream
        if stream is None or len(stream) != self.n_read or rules != (stream.max_match, stream.window, stream.end):
            return TokenStream(*rules).going_on(self.n_read, self.tokens())
        return stream

    @property
    def _alone(self) -> AbstractContextManager[Any]:
        """Inside, no other thread reads in the stream that others share."""
        return contextlib.nullcontext() if self._stream is None else self._stream.lock

    def tokens(self, last: int | None = None) -> Tensor:
        """The ids that later matches depend on, (n,) int64, on the CPU; of these, the `last` ones (None: all).

        KernelError as for :meth:`read`.
        """
        with self._alone:
            if self._stream is not None:
                return self._stream.tokens(self.n_read, last)
            return self._tokens[0 if last is None else max(0, len(self._tokens) - last) :].cpu()

    def check(self, vocab_size: int) -> None:
        """ConfigError for an id that no model of `vocab_size` ids has read."""
        if ((self._tokens < 0) | (self._tokens >= vocab_size)).any():
            raise ConfigError(f"state, memory: ids must be 0 to {vocab_size - 1}")

    def clone(self) -> Recollection:
        """A copy that shares no memory with others of its sequence."""
        with self._alone:
            if self._stream is not None and len(self._stream) == self.n_read:
                return Recollection._at_end_of(self._stream.copy())
            return Recollection(self.tokens().clone(), self.n_read)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds, those of the stream that it shares with others of its sequence included."""
        return self.tokens().nbytes if self._stream is None else self._stream.nbytes


def recall(
    tokens: Tensor,
    before: Sequence[Recollection],
    rosa: RosaConfig,
    cu_seqlens: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, tuple[Recollection, ...]]:
    """What the memories of several sequences find in tokens (B, T), packed ones with `cu_seqlens` and B = 1.

    Returns:
        recalled (B, T, K, 2), and the recollections behind the tokens.
    """
    pieces = tokens if cu_seqlens is None else tokens[0].split(cu_seqlens.diff().tolist())
    found = [memory.read(ids, rosa, documents) for memory, ids in zip(before, pieces, strict=True)]
    parts = [part for part, _, _ in found]
    recalled = torch.stack(parts) if cu_seqlens is None else torch.cat(parts).unsqueeze(0)
    return recalled, tuple(memory for _, _, memory in found)
