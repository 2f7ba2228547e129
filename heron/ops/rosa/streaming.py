"""ROSA token by token, for many streams at once, bit-equal to the whole sequence at once."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _select
from heron.ops.rosa.cpu import rosa_cpu
from heron.ops.rosa.dp import advance, length_dtype, lengths_at_end, longest_then_latest
from heron.ops.rosa.inputs import MOST_SYMBOLS, check_max_match, check_pair, check_range


class RosaStream:
    """The history of many streams, and :func:`heron.ops.rosa` at its end.

    However it got to its `n_tokens` (by steps, prefills, truncations, as a fork), what it gives next is what the op
    gives at that place of the whole sequences. It holds both symbols and one match length for every place of every
    stream, ``n_streams * capacity * (2 * symbol + length)`` bytes, all taken when it is made: a symbol is 1 byte for
    alphabets up to 256, else 4; a length is 2 bytes for capacities up to 32768, else 4.

    Args:
        n_streams: S.
        alphabet: symbols are in [0, alphabet).
        capacity: the most symbols that a stream can hold.
        max_match: as in :func:`heron.ops.rosa`.
        device: where symbols come from and answers go.

    Raises:
        KernelError: a size that is not in [1, 2^31], or a `max_match` below 1.
    """

    def __init__(
        self,
        n_streams: int,
        alphabet: int,
        capacity: int,
        max_match: int | None = None,
        device: torch.device | str = "cpu",
    ):
        for name, size in (("n_streams", n_streams), ("alphabet", alphabet), ("capacity", capacity)):
            if type(size) is not int or not 1 <= size <= MOST_SYMBOLS:
                raise KernelError(f"rosa: {name} must be an int in [1, {MOST_SYMBOLS}], got {size!r}")
        check_max_match(max_match)
        self.n_streams, self.alphabet, self.capacity, self.max_match = n_streams, alphabet, capacity, max_match
        self.n_tokens = 0
        symbol = torch.uint8 if alphabet <= 256 else torch.int32
        self._q = torch.empty(n_streams, capacity, dtype=symbol, device=device)
        self._latest_first = torch.empty_like(self._q)  # k from the last column to the left: k[n_tokens-1], ..., k[0]
        # By distance, as in dp.py, after the last query; zeros from column n_tokens - 1 on.
        self._lengths = torch.zeros(n_streams, capacity, dtype=length_dtype(capacity), device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the history; they depend on the sizes alone, not on `n_tokens`."""
        return sum(buffer.nbytes for buffer in (self._q, self._latest_first, self._lengths))

    def step(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Take one symbol a stream; O(n_tokens) vector work.

        Args:
            q, k: (S,) symbols.

        Returns:
            src, length: (S,) int64 each, of this position.

        Raises:
            KernelError: shapes, dtypes, devices or symbols that do not fit, or no capacity left; nothing has changed.
        """
        self._check(q.unsqueeze(-1), k.unsqueeze(-1))
        return self._step(q, k)

    def prefill(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Take `n` symbols a stream: as `n` steps, but where the C++ form runs, in one call over the whole history.

        Args:
            q, k: (S, n) symbols, n >= 0.

        Returns:
            src, length: (S, n) int64 each, of these positions; src counts from the start of the history.

        Raises:
            KernelError: shapes, dtypes, devices or symbols that do not fit, or no capacity left; nothing has changed.
        """
        self._check(q, k)
        before, after = self.n_tokens, self.n_tokens + q.shape[1]
        if _select.rosa(q.device).impl == "cpu":
            self._q[:, before:after] = q
            self._latest_first[:, self.capacity - after : self.capacity - before] = k.flip(1)
            history = self._latest_first[:, self.capacity - after :]
            src, length = rosa_cpu(self._q[:, :after], history.flip(1), self.max_match)
            self.n_tokens = after
            self._find_lengths()
            return src[:, before:], length[:, before:]
        src = torch.empty(q.shape, dtype=torch.int64, device=q.device)
        length = torch.empty_like(src)
        for n in range(q.shape[1]):
            src[:, n], length[:, n] = self._step(q[:, n], k[:, n])
        return src, length

    def fork(self) -> RosaStream:
        """An independent copy, of as many bytes."""
        twin = copy.copy(self)
        twin._q, twin._latest_first, twin._lengths = map(torch.clone, (self._q, self._latest_first, self._lengths))
        return twin

    def truncate(self, n_tokens: int) -> None:
        """Forget all after the first `n_tokens`; vector work of n_tokens times the longest match that ends there.

        Raises:
            KernelError: `n_tokens` is negative or more than there are.
        """
        if type(n_tokens) is not int or not 0 <= n_tokens <= self.n_tokens:
            raise KernelError(
                f"rosa: truncate takes 0 to {self.n_tokens} tokens, which the history holds; got {n_tokens}"
            )
        forgotten = self.n_tokens - n_tokens
        kept = self._k()[:, forgotten:].clone()
        self._latest_first[:, self.capacity - n_tokens :] = kept
        self.n_tokens = n_tokens
        self._find_lengths()

    def _k(self) -> Tensor:
        return self._latest_first[:, self.capacity - self.n_tokens :]

    def _step(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        i = self.n_tokens
        if i == 0:
            src = torch.full((self.n_streams,), -1, device=q.device)
            length = torch.zeros_like(src)
        else:
            advance(self._lengths[:, :i], self._k(), q, self.max_match)
            src, length = longest_then_latest(self._lengths[:, :i])
        self._q[:, i] = q
        self._latest_first[:, self.capacity - 1 - i] = k
        self.n_tokens = i + 1
        return src, length

    def _find_lengths(self) -> None:
        self._lengths.zero_()
        self._lengths[:, : self.n_tokens] = lengths_at_end(self._q[:, : self.n_tokens], self._k(), self.max_match)

    def _check(self, q: Tensor, k: Tensor) -> None:
        check_pair(q, k)
        if q.shape[0] != self.n_streams or q.device != self._q.device:
            raise KernelError(
                f"rosa: the history has {self.n_streams} streams on {self._q.device}; got {q.shape[0]} on {q.device}"
            )
        if self.n_tokens + q.shape[1] > self.capacity:
            raise KernelError(
                f"rosa: the history holds {self.n_tokens} of at most {self.capacity} symbols a stream, "
                f"no room for {q.shape[1]} more; make it with a larger capacity, or truncate"
            )
        check_range("q", q, self.alphabet)
        check_range("k", k, self.alphabet)


def rosa_last(
    q: Tensor, k: Tensor, lengths: Tensor | None = None, max_match: int | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`heron.ops.rosa` at the last token alone, for callers that keep the history themselves: O(T) vector work.

    Args:
        q, k: (S, T) symbols of the whole history, T >= 1.
        lengths: what the call for the first T - 1 tokens returned; None: found from the symbols.
        max_match: as in :func:`heron.ops.rosa`.

    Returns:
        src: (S,) int64.
        lengths: (S, T), int16, or int32 beyond 32768 tokens.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together, no token, or a `max_match` below 1. Symbols are
            not looked at one by one: whoever keeps them has checked them.
    """
    check_pair(q, k)
    check_max_match(max_match)
    last = q.shape[1] - 1
    if last < 0 or (lengths is not None and lengths.shape != (len(q), last)):
        got = None if lengths is None else tuple(lengths.shape)
        raise KernelError(f"rosa: wanted at least 1 token and lengths of one less, got {tuple(q.shape)} and {got}")
    latest_first = k[:, :last].flip(1)
    if lengths is None:
        lengths = lengths_at_end(q[:, :last], latest_first, max_match)
    lengths = torch.nn.functional.pad(lengths.to(length_dtype(last + 1)), (0, 1))
    if last == 0:
        return torch.full(q.shape[:1], -1, device=q.device), lengths
    so_far = lengths[:, :last]
    advance(so_far, latest_first, q[:, last], max_match)
    return longest_then_latest(so_far)[0], lengths
