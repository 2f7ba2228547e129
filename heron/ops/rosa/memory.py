"""ROSA over token streams as long as a corpus or a session, in C++ (csrc/memory.cpp) or plain PyTorch."""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _build, _choice
from heron.ops.rosa.inputs import MOST_SYMBOLS, SYMBOL_DTYPES, check_max_match, check_range, check_window
from heron.ops.rosa.levels import find_last, found_in

MOST_TOKENS = 2**31
LONGEST_MATCH = 65535
N_ROOTS = 4096  # of a stream; each tree of an index has its own
CSRC = Path(__file__).parent / "csrc"
TREES = CSRC / "trees.h"
_FEW = 16  # tokens that plain PyTorch reads one by one


class TokenStream:
    """A stream of token ids that grows, and for each id read where the longest suffix occurred before.

    With x the stream, for position t and 0 <= j < t::

        len(t, j) = max l <= max_match such that x[t-s] == x[j-s] for all 0 <= s < l
        length[t] = max over j of len(t, j)
        src[t]    = the largest j that attains it, or -1 where length[t] is 0

    which is :func:`heron.ops.rosa` of one stream with itself. What followed, ``x[src[t] + 1]``, is known at t.

    Args:
        max_match: tokens of a match that count, 1 to 65535.
        window: how far back a match may end, ``t - window <= j``, from 1 on; None: anywhere. With a window the memory
            is bounded: between 12 and 24 bytes for each of ``window + max_match`` tokens. Without, about as much for
            each token read.
        end: id that ends a document: a match that reaches the beginning of a document ends there. None: the stream is
            one document.
        impl: "cpu" (C++, built at first use, O(log T) a token expected), "torch" (O(T) vector work a token), or "auto":
            cpu, and torch, with one line on stderr, where that can't be built.

    Raises:
        KernelError: an argument out of range, or an `impl` that does not exist or can't be built.
    """

    def __init__(
        self, max_match: int = 64, window: int | None = None, end: int | None = None, impl: str = "auto"
    ) -> None:
        check_max_match(max_match)
        if max_match is None or max_match > LONGEST_MATCH:
            raise KernelError(f"rosa: max_match of a token stream must be 1 to {LONGEST_MATCH}, got {max_match}")
        check_window(window)
        if window is not None and window >= MOST_TOKENS:
            raise KernelError(f"rosa: window of a token stream must be less than {MOST_TOKENS}, got {window}")
        self.max_match, self.window, self.end = max_match, window, end
        self.impl = stream_choice().impl if impl == "auto" else impl
        form = _choice.form_of("rosa", self.impl, {"cpu": _Native, "torch": _Plain})
        self._parts: _Native | _Plain = form(max_match, window, end)
        self._first = 0  # position of the first token that the parts know
        self.lock = threading.RLock()  # for those who share the stream; it does not take it itself

    def __len__(self) -> int:
        return self._first + self._parts.n_tokens

    def read(self, tokens: Tensor, n_found: int = 1) -> tuple[Tensor, Tensor]:
        """Read on: src and length of :meth:`recall`."""
        _, length, src = self.recall(tokens, n_found)
        return src, length

    def recall(self, tokens: Tensor, n_found: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Read on.

        Args:
            tokens: (n,) ids in [0, 2^31) of an integer dtype, on the CPU.
            n_found: how many matches are wanted, of these: for each length the latest match of so many tokens or more.
                The first is the longest; each further one is the longest with another follower than all before it.

        Returns:
            followers, length, src: (n, n_found) int64, ``followers = x[src + 1]``; 0, 0 and -1 where there is no match.

        Raises:
            KernelError: ids of another shape, dtype or device, or out of range; more than 2^31 tokens in all.
        """
        if tokens.dim() != 1 or tokens.dtype not in SYMBOL_DTYPES or tokens.device.type != "cpu":
            got = f"{tuple(tokens.shape)} of {tokens.dtype} on {tokens.device}"
            raise KernelError(f"rosa: tokens of a stream must be (n,) integers on the CPU, got {got}")
        check_range("tokens", tokens, MOST_SYMBOLS)
        if len(self) + len(tokens) > MOST_TOKENS:
            raise KernelError(f"rosa: a stream holds at most {MOST_TOKENS} tokens; begin a new one")
        followers, length, src = self._parts.recall(tokens, n_found)
        return followers, length, torch.where(src >= 0, src + self._first, src)

    def recall_one(self, token: int, n_found: int = 1) -> tuple[list[int], list[int], list[int]]:
        """:meth:`recall` of one id: `n_found` followers, lengths and src. Errors as there."""
        if not 0 <= token < MOST_SYMBOLS:
            raise KernelError(f"rosa: tokens must be 0 to {MOST_SYMBOLS - 1}, got {token}")
        if len(self) == MOST_TOKENS:
            raise KernelError(f"rosa: a stream holds at most {MOST_TOKENS} tokens; begin a new one")
        followers, length, src = self._parts.recall_one(token, n_found)
        return followers, length, [at + self._first if at >= 0 else at for at in src]

    def tokens(self, n_read: int | None = None, last: int | None = None) -> Tensor:
        """The ids that matches depend on after the first `n_read` (None: all) were read, (n,) int64.

        That is all of them, or with a window the last ``window + max_match``; of these, the `last` ones (None: all).

        Raises:
            KernelError: some of them were overwritten since.
        """
        n = self._parts.n_tokens if n_read is None else n_read - self._first
        first = 0 if self.window is None else max(0, n - self.window - self.max_match)
        first = first if last is None else max(first, n - last)
        if first < self._parts.first_kept:
            raise KernelError(
                f"rosa: of the tokens before {n_read}, not all that a window needs are kept; copy in time"
            )
        return self._parts.tokens(first)[: n - first]

    def copy(self) -> TokenStream:
        """Another stream that has read the same."""
        copy = object.__new__(TokenStream)
        copy.__dict__.update(self.__dict__)
        copy._parts, copy.lock = self._parts.copy(), threading.RLock()
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        return _read_again, (self.max_match, self.window, self.end, self.impl, len(self), self.tokens())

    def going_on(self, n_read: int, tokens: Tensor) -> TokenStream:
        """A stream with the settings of this one that had read `n_read` ids, of which `tokens` are the last.

        With what :meth:`tokens` and ``len`` gave, it finds what the stream that gave them would have found.

        Raises:
            KernelError: as :meth:`read`.
        """
        stream = TokenStream(self.max_match, self.window, self.end, self.impl)
        stream.read(tokens)
        stream._first = n_read - len(tokens)
        return stream

    def trees(self) -> tuple[Tensor, Tensor]:
        """Nodes (n, 2) and roots (R,), uint32, as :class:`TokenIndex` keeps them.

        Raises:
            KernelError: a stream with a window, or not in C++.
        """
        if self.window is not None:
            raise KernelError("rosa: a stream with a window has no trees of all its tokens")
        return self.arrays()[1:]

    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        """A copy of what the stream consists of: ids (P,), nodes (P, 2) and roots (R,), uint32.

        P is the number of tokens read; with a window that of the places of a ring, of which not all may be in use.

        Raises:
            KernelError: a stream that is not in C++.
        """
        if not isinstance(self._parts, _Native):
            raise KernelError('rosa: only a stream of impl "cpu" consists of trees')
        return self._parts.arrays()

    @property
    def n_placed(self) -> int:
        """How many tokens were read into :meth:`arrays`; the place of the next is behind them, modulo P."""
        return self._parts.n_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the stream holds."""
        return self._parts.nbytes


def _read_again(
    max_match: int, window: int | None, end: int | None, impl: str, n_read: int, tokens: Tensor
) -> TokenStream:
    """A stream out of a pickle, or a deep copy."""
    return TokenStream(max_match, window, end, impl).going_on(n_read, tokens)


def rosa_stream(q: Tensor, k: Tensor, max_match: int | None = None, window: int | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`heron.ops.rosa`: each of the streams (S, T) by itself.

    Raises:
        KernelError: two tensors, or no `max_match`, or as :class:`TokenStream`.
    """
    if q is not k or max_match is None:
        raise KernelError('rosa: impl="stream" needs one tensor as q and as k, and a max_match; use impl="auto"')
    if q.numel() == 0:
        return torch.empty(q.shape, dtype=torch.int64), torch.empty(q.shape, dtype=torch.int64)
    src, length = zip(*(TokenStream(max_match, window).read(symbols) for symbols in q), strict=True)
    return torch.cat(src, dim=1).T.contiguous(), torch.cat(length, dim=1).T.contiguous()


class _Native:
    """A stream in C++."""

    def __init__(self, max_match: int, window: int | None, end: int | None) -> None:
        FORM.require(torch.device("cpu"))
        self._own(library().heron_stream_new(max_match, window or 0, -1 if end is None else end, N_ROOTS))
        self.n_tokens = 0

    def _own(self, stream: int | None) -> None:
        if stream is None:
            raise KernelError("rosa: memory ran out; give the stream a window, or a smaller one")
        self._stream = stream
        weakref.finalize(self, library().heron_stream_free, stream)

    def recall(self, tokens: Tensor, n_found: int) -> tuple[Tensor, Tensor, Tensor]:
        tokens = tokens.to(torch.int32).contiguous()
        followers, src = torch.empty(2, len(tokens), n_found, dtype=torch.int64)
        length = torch.empty(len(tokens), n_found, dtype=torch.int32)
        results = (part.data_ptr() for part in (src, length, followers))
        if library().heron_stream_read(self._stream, tokens.data_ptr(), len(tokens), n_found, *results):
            raise KernelError(f"rosa: memory ran out after {self.n_tokens} tokens; give the stream a window")
        self.n_tokens += len(tokens)
        return followers, length.long(), src

    def recall_one(self, token: int, n_found: int) -> tuple[list[int], list[int], list[int]]:
        src, length, followers = (
            (ctypes.c_int64 * n_found)(),
            (ctypes.c_int32 * n_found)(),
            (ctypes.c_int64 * n_found)(),
        )
        read = ctypes.byref(ctypes.c_uint32(token))
        if library().heron_stream_read(self._stream, read, 1, n_found, src, length, followers):
            raise KernelError(f"rosa: memory ran out after {self.n_tokens} tokens; give the stream a window")
        self.n_tokens += 1
        return followers[:], length[:], src[:]

    @property
    def first_kept(self) -> int:
        return library().heron_stream_first_kept(self._stream)

    def tokens(self, first: int) -> Tensor:
        tokens = torch.empty(self.n_tokens - first, dtype=torch.int32)
        library().heron_stream_tokens(self._stream, first, len(tokens), tokens.data_ptr())
        return tokens.long()

    def copy(self) -> _Native:
        copy = object.__new__(_Native)
        copy._own(library().heron_stream_copy(self._stream))
        copy.n_tokens = self.n_tokens
        return copy

    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        n = library().heron_stream_n_places(self._stream)
        ids = _copied(library().heron_stream_ids(self._stream), n)
        nodes = _copied(library().heron_stream_nodes(self._stream), 2 * n)
        return ids, nodes.view(-1, 2), _copied(library().heron_stream_roots(self._stream), N_ROOTS)

    @property
    def nbytes(self) -> int:
        return library().heron_stream_bytes(self._stream)


def _copied(address: int, n: int) -> Tensor:
    """`n` uint32 at `address` of the library's memory."""
    if n == 0:
        return torch.empty(0, dtype=torch.uint32)
    return torch.frombuffer((ctypes.c_uint32 * n).from_address(address), dtype=torch.uint32).clone()


class _Plain:
    """A stream in PyTorch: its tokens."""

    def __init__(self, max_match: int, window: int | None, end: int | None) -> None:
        self._rules = max_match, window, end
        self._kept, self.n_tokens = torch.empty(0, dtype=torch.int64), 0

    def recall(self, tokens: Tensor, n_found: int) -> tuple[Tensor, Tensor, Tensor]:
        n, all_of_them = len(tokens), torch.cat((self._kept, tokens.long()))
        first = self.n_tokens - len(self._kept)
        if n <= _FEW:
            found = [find_last(all_of_them[: len(all_of_them) - n + 1 + i], *self._rules, n_found) for i in range(n)]
            empty = torch.empty(0, n_found, dtype=torch.int64)
            src, length = (torch.cat(parts) for parts in zip(*found, strict=True)) if found else (empty, empty)
        else:
            src, length = (part[len(self._kept) :] for part in found_in(all_of_them, *self._rules, n_found))
        self.n_tokens += n
        max_match, window, _ = self._rules
        self._kept = all_of_them if window is None else all_of_them[-window - max_match :]
        followers = torch.where(src >= 0, all_of_them[(src + 1).clamp(max=len(all_of_them) - 1)], 0) if n else src
        return followers, length, torch.where(src >= 0, src + first, src)

    def recall_one(self, token: int, n_found: int) -> tuple[list[int], list[int], list[int]]:
        followers, length, src = (part[0].tolist() for part in self.recall(torch.tensor([token]), n_found))
        return followers, length, src

    @property
    def first_kept(self) -> int:
        return self.n_tokens - len(self._kept)

    def tokens(self, first: int) -> Tensor:
        return self._kept[first - self.n_tokens + len(self._kept) :].clone()

    def copy(self) -> _Plain:
        copy = _Plain(*self._rules)
        copy._kept, copy.n_tokens = self._kept, self.n_tokens  # never changed in place
        return copy

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes


class TokenIndex:
    """What :class:`TokenStream` knows of tokens that are read once and kept, for other streams to look into.

    Args:
        tokens: (n,) ids, uint16 or uint32, on the CPU as all.
        nodes: (n - 1, 2) uint32, the trees: of each position but the last the two below it. What follows the last
            is not known.
        roots: (R,) uint32, R a power of two: of each residue of ids the newest position.
        max_match, end: of the stream that was read. Longer matches are not told apart.

    They may be memory maps; 10 or 12 bytes a token.

    Raises:
        KernelError: tensors that do not belong together, no C++ compiler.
    """

    def __init__(self, tokens: Tensor, nodes: Tensor, roots: Tensor, max_match: int, end: int | None):
        parts = (tokens, nodes, roots)
        whole = tokens.dtype in (torch.uint16, torch.uint32) and tokens.dim() == roots.dim() == 1
        fits = nodes.dtype == roots.dtype == torch.uint32 and nodes.shape == (max(len(tokens) - 1, 0), 2)
        if not (whole and fits and roots.numel().bit_count() == 1 and all(part.device.type == "cpu" for part in parts)):
            got = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in parts)
            raise KernelError(f"rosa: these tensors are no index of tokens: {got}")
        FORM.require(torch.device("cpu"))
        self.parts = tokens.contiguous(), nodes.contiguous(), roots.contiguous()
        self.max_match, self.end = max_match, end

    @classmethod
    def of(cls, tokens: Tensor, max_match: int = 64, end: int | None = None) -> TokenIndex:
        """The index of (n,) ids. It holds 12 to 24 bytes a token more while it is built.

        Raises:
            KernelError: as :class:`TokenStream` and its `read`; no C++ compiler.
        """
        stream = TokenStream(max_match, end=end, impl="cpu")
        stream.read(tokens[:-1])
        small = len(tokens) == 0 or int(tokens.max()) < 2**16
        return cls(tokens.to(torch.uint16 if small else torch.uint32), *stream.trees(), max_match, end)

    def find(self, tokens: Tensor, n_last: int, n_found: int = 1) -> tuple[Tensor, Tensor]:
        """For each of the last `n_last` of (n,) ids of another stream, where its longest suffix occurs in the index.

        Args:
            tokens: ids on the CPU; of those before the last ones, `max_match` - 1 are of use.
            n_found: as in :meth:`TokenStream.read`.

        Returns:
            src, length: (n_last, n_found) int64; of equally long ones the latest in the index; -1 and 0: none.

        Raises:
            KernelError: an index that is damaged.
        """
        _, length, src = self.recall(tokens, n_last, n_found)
        return src, length

    def recall(self, tokens: Tensor, n_last: int, n_found: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`find`: what followed in the index, (n_last, n_found) int64, 0 for none, then length and src."""
        before = max(0, len(tokens) - n_last - self.max_match + 1)
        tokens = tokens[before:].to(torch.int32).contiguous()
        followers, src = torch.empty(2, n_last, n_found, dtype=torch.int64)
        length = torch.empty(n_last, n_found, dtype=torch.int32)
        ids, nodes, roots = self.parts
        if library().heron_index_find(
            ids.data_ptr(), ids.itemsize, nodes.data_ptr(), roots.data_ptr(), len(nodes), len(roots), self.max_match,
            -1 if self.end is None else self.end, tokens.data_ptr(), len(tokens) - n_last, n_last, n_found,
            src.data_ptr(), length.data_ptr(), followers.data_ptr(),
        ):  # fmt: skip
            raise KernelError("rosa: this index of tokens is damaged; build it anew")
        return followers, length.long(), src


@functools.cache
def library() -> ctypes.CDLL:
    """The library, built when needed and tried on a small problem.

    Raises:
        KernelError: it can't be built here, or what was built gives wrong answers.
    """
    built = _build.load_c_library("rosa_memory", [CSRC / "memory.cpp"], (), [TREES])
    pointer, small, large, whole = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32
    for name, result, *arguments in (
        ("stream_new", pointer, small, large, large, whole),
        ("stream_copy", pointer, pointer),
        ("stream_free", None, pointer),
        ("stream_bytes", large, pointer),
        ("stream_read", small, pointer, pointer, large, small, pointer, pointer, pointer),
        ("stream_first_kept", large, pointer),
        ("stream_tokens", None, pointer, large, large, pointer),
        ("stream_n_places", large, pointer),
        ("stream_ids", pointer, pointer),
        ("stream_nodes", pointer, pointer),
        ("stream_roots", pointer, pointer),
        ("index_find", small, pointer, small, pointer, pointer, large, whole, small, large, pointer, large, large,
         small, pointer, pointer, pointer),
    ):  # fmt: skip
        function = getattr(built, f"heron_{name}")
        function.restype, function.argtypes = result, arguments
    return built


FORM = _choice.NativeForm("rosa", "cpu", "ROSA over token streams", lambda device: None, library)


def stream_choice() -> _choice.Choice:
    """The form of :class:`TokenStream` that "auto" takes."""
    other = _choice.Choice("torch", "plain PyTorch, linear in the length")
    return FORM.choice("C++, O(log T) a token", other, torch.device("cpu"))
