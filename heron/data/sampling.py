"""Which tokens the samples of a run begin at, as pure functions of the sample's number.

Big data follow RWKV-LM: a cubic permutation of the slots of `ctx_len` tokens, which needs no table. Small data follow a
seeded permutation that is new in each epoch. Both count samples over the whole run and all processes, so that the
order depends on nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TypeVar

import numpy as np

from heron.errors import ConfigError, DataError, counted

_Samples = TypeVar("_Samples", int, np.ndarray)
_LARGEST_INT64_PRIME = math.isqrt(2**63 - 1)  # below it a product of two residues fits int64


def is_prime(n: int) -> bool:
    """Whether `n` is prime, certain below 3.1e23: Miller-Rabin to the first twelve prime bases.

    Source of the bound: Sorenson and Webster, "Strong pseudoprimes to twelve prime bases" (2015).
    """
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if n < 2 or any(n % base == 0 for base in bases):
        return n in bases
    twos = ((n - 1) & (1 - n)).bit_length() - 1
    for base in bases:
        x = pow(base, (n - 1) >> twos, n)
        if x == 1:
            continue
        for _ in range(twos):
            if x == n - 1:
                break
            x = x * x % n
        else:
            return False
    return True


def magic_prime(n_tokens: int, ctx_len: int) -> int | None:
    """The largest prime p <= slots - 1 with p mod 3 = 2, if p / slots > 0.9; slots = n_tokens // ctx_len.

    Then 3 does not divide p - 1, so x -> x**3 is a bijection modulo p. None: the data are too small for one.
    Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/dataset.py.
    """
    slots = n_tokens // ctx_len
    candidate = slots - 1 - (slots - 3) % 3
    while 10 * candidate > 9 * slots:
        if is_prime(candidate):
            return candidate
        candidate -= 3
    return None


def check_prime(prime: int, n_tokens: int, ctx_len: int) -> None:
    """Pass a prime that RWKV-LM takes for these data: p mod 3 = 2 and 0.9 < p / slots <= 1, with slots as above.

    Any such prime orders the samples, not only the largest; another one gives another order.
    Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/dataset.py.

    Raises:
        ConfigError: a number that RWKV-LM refuses, or with which it would read past the end of the data. The message
            says why, and which prime the data have.
    """
    slots = n_tokens // ctx_len
    if not is_prime(prime):
        fault = "it is no prime"
    elif prime % 3 != 2:
        fault = f"it leaves {prime % 3} when divided by 3, and only a prime that leaves 2 visits every sample once"
    elif not 9 * slots < 10 * prime:
        fault = f"it is at most 0.9 of the {slots:,} samples in the data, and the others would never be seen"
    elif prime > slots:
        fault = f"it is more than the {slots:,} samples in the data"
    elif prime * ctx_len >= n_tokens:
        fault = f"its last sample ends with the data, at token {n_tokens:,}, and lacks a next token"
    else:
        return
    right = magic_prime(n_tokens, ctx_len)
    todo = "there is none for data as small as these: drop the flag" if right is None else f"type {right}, or drop it"
    raise ConfigError(f"magic_prime {prime}, for {n_tokens:,} tokens and ctx_len {ctx_len}: {fault}; {todo}")


def cubic_slot(sample: _Samples, prime: int) -> _Samples:
    """``(f * sample**3) mod prime`` with ``f = int(prime * (sqrt(5) - 1) / 2)``; samples count from 1.

    `prime` consecutive samples visit every slot in [0, prime) once. Exact for every prime below 2**62: in int64 with a
    reduction after each product where two residues' product fits, else in Python integers.
    Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/dataset.py.

    Args:
        sample: an int, or integers of any shape.
        prime: one that :func:`check_prime` passes.

    Returns:
        The slot, an int or int64 of the shape of `sample`.
    """
    factor = int(prime * ((math.sqrt(5) - 1) / 2))
    if isinstance(sample, int):
        return factor * pow(sample, 3, prime) % prime
    residue = np.asarray(sample, dtype=np.int64) % prime
    if prime > _LARGEST_INT64_PRIME:
        residue = residue.astype(object)
    cube = residue * residue % prime * residue % prime
    return (cube * factor % prime).astype(np.int64)


@functools.lru_cache(maxsize=2)
def permuted_starts(n_tokens: int, ctx_len: int, seed: int, epoch: int) -> np.ndarray:
    """Where the samples of one epoch over small data begin, in the order in which they are taken.

    The data are cut into windows of `ctx_len` targets on a grid that begins at a new place in [0, ctx_len) in each
    epoch, so that the same tokens are met at other positions of the context; the last window is moved back to end with
    the data. The order is the rank of a hash of (seed, epoch, window): the same on every platform and NumPy.

    Returns:
        (windows,) int64, read-only; windows = (n_tokens - 1) // ctx_len in every epoch, each sample once.
    """
    windows = (n_tokens - 1) // ctx_len
    keys = _hash(np.arange(windows + 1, dtype=np.uint64), seed, epoch)
    offset = int(keys[windows] % np.uint64(ctx_len))
    order = np.argsort(keys[:windows], kind="stable")
    starts = np.minimum(offset + order * ctx_len, n_tokens - 1 - ctx_len).astype(np.int64)
    starts.flags.writeable = False
    return starts


@dataclasses.dataclass(frozen=True)
class SampleOrder:
    """The samples of a run, each `ctx_len` inputs and as many targets, by their number.

    Attributes:
        n_tokens: length of the data.
        ctx_len: tokens of a sample (T).
        seed: of the permutation; the cubic order has none.
        prime: magic prime of the cubic order, or None for the seeded permutation.

    Raises:
        DataError: the data hold no sample of `ctx_len` + 1 tokens.
    """

    n_tokens: int
    ctx_len: int
    seed: int
    prime: int | None

    def __post_init__(self) -> None:
        if self.n_tokens <= self.ctx_len:
            raise DataError(
                f"a sample of ctx_len {self.ctx_len} needs {self.ctx_len + 1} tokens, the data hold {self.n_tokens}; "
                f"use more data or a ctx_len of at most {max(self.n_tokens - 1, 1)}"
            )

    @property
    def samples_per_epoch(self) -> int:
        """Samples until every place was visited once."""
        return self.prime or (self.n_tokens - 1) // self.ctx_len

    @property
    def description(self) -> str:
        """One line for the console."""
        if self.prime:
            return f"{self.prime:,} samples an epoch in RWKV-LM's cubic order, magic prime {self.prime}"
        samples = counted(self.samples_per_epoch, "samples")
        return f"{samples} an epoch, shifted and permuted anew in each, seed {self.seed}"

    def starts(self, first: int, count: int) -> np.ndarray:
        """Positions in the data, (count,) int64, of samples `first` .. `first + count - 1`, counted from 0.

        Sample g of the cubic order is RWKV-LM's s = 1 + g. Each start leaves room for `ctx_len` + 1 tokens.
        """
        if self.prime:
            return cubic_slot(1 + first + np.arange(count, dtype=np.int64), self.prime) * self.ctx_len
        parts = [np.empty(0, dtype=np.int64)]
        while count > 0:
            epoch, at = divmod(first, self.samples_per_epoch)
            parts.append(permuted_starts(self.n_tokens, self.ctx_len, self.seed, epoch)[at : at + count])
            first += len(parts[-1])
            count -= len(parts[-1])
        return np.concatenate(parts)


def _hash(values: np.ndarray, *keys: int) -> np.ndarray:
    """uint64 `values` mixed with each of `keys` in turn, as SplitMix64 does (Steele, Lea and Flood, 2014)."""
    for key in keys:
        values = values + np.array([(key + 1) % 2**64], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        values = values ^ (values >> np.uint64(31))
    return values
