"""A pair of .idx and .bin with hashes that was changed in any way is refused, or reads as before."""

from __future__ import annotations

import random
import struct
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from heron.data import binidx
from heron.data.checks import path_for
from heron.data.prepare import prepare
from heron.errors import DataError
from tests.torture.result import Result

VOCAB_SIZE = 256
Mutation = Callable[[random.Random, bytearray], bytearray]


def flipped_bit(rng: random.Random, data: bytearray) -> bytearray:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def changed_bytes(rng: random.Random, data: bytearray) -> bytearray:
    begin = rng.randrange(len(data))
    count = rng.randint(1, 16)
    data[begin : begin + count] = rng.randbytes(len(data[begin : begin + count]))
    return data


def cut(rng: random.Random, data: bytearray) -> bytearray:
    return data[: rng.randrange(len(data))]


def extended(rng: random.Random, data: bytearray) -> bytearray:
    return data + rng.randbytes(rng.randint(1, 64))


def moved(rng: random.Random, data: bytearray) -> bytearray:
    begin, count = rng.randrange(len(data)), rng.randint(1, 16)
    piece = data[begin : begin + count]
    del data[begin : begin + count]
    at = rng.randint(0, len(data))
    return data[:at] + piece + data[at:]


def zeroed(rng: random.Random, data: bytearray) -> bytearray:
    begin = rng.randrange(len(data))
    end = min(len(data), begin + rng.choice((1, 8, 64, 512)))
    data[begin:end] = bytes(end - begin)
    return data


def extreme_number(rng: random.Random, data: bytearray) -> bytearray:
    """A number of the size and place of those in the index, at a border of its type."""
    form = rng.choice("iqQB")
    value = rng.choice({"i": (-1, 2**31 - 1, -(2**31)), "q": (-1, 2**63 - 1), "Q": (2**64 - 1,), "B": range(256)}[form])
    at = rng.choice((9, 17, 18, 26, 34 + 4 * rng.randrange(40)))
    raw = struct.pack(f"<{form}", value)
    data[at : at + len(raw)] = raw
    return data


MUTATIONS: list[Mutation] = [flipped_bit, changed_bytes, cut, extended, moved, zeroed, extreme_number]


def made(folder: Path, rng: random.Random) -> Path:
    """A pair of some kilobytes with hashes."""
    texts = ["".join(chr(rng.randint(1, 127)) for _ in range(rng.randint(1, 200))) for _ in range(40)]
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_bytes(text.encode())
    prepare([str(folder)], str(folder / "data"), "bytes", workers=1, hashes=True)
    return folder / "data"


def read(prefix: Path) -> tuple[bytes, bytes]:
    """The documents' sizes and the tokens, as a training run gets them."""
    pair = binidx.open_binidx(prefix)
    binidx.check_ids(pair, VOCAB_SIZE)
    return pair.sizes.tobytes(), pair.tokens.astype(np.int64).tobytes()


def read_as_upstream(prefix: Path) -> tuple[bytes, bytes]:
    """The same by a reader that trusts every number, as RWKV-LM's does."""
    idx, raw = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    _, _, code, n, _ = binidx.HEADER.unpack_from(idx)
    dtype = binidx.DTYPES[code]
    sizes = np.frombuffer(idx, "<i4", n, binidx.HEADER.size)
    offsets = np.frombuffer(idx, "<i8", n, binidx.HEADER.size + 4 * n)
    documents = [np.frombuffer(raw, dtype, size, offset) for size, offset in zip(sizes, offsets, strict=True)]
    return sizes.tobytes(), np.concatenate(documents).astype(np.int64).tobytes()


def run(trials: int, seed: int) -> Result:
    """`trials` changed pairs, each a change of the .idx, the .bin or the file of hashes."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    control_trials = caught = 0
    with tempfile.TemporaryDirectory() as scratch:
        prefix = made(Path(scratch), rng)
        pair = binidx.idx_path(prefix), binidx.bin_path(prefix)
        sound = {path: path.read_bytes() for path in (*pair, path_for(pair))}
        before = read(prefix)
        effective = 0
        while effective < trials:
            path = rng.choices(list(sound), (5, 4, 1))[0]
            mutation = rng.choice(MUTATIONS)
            changed = bytes(mutation(rng, bytearray(sound[path])))
            if changed == sound[path]:
                continue
            effective += 1
            for each, content in sound.items():
                each.write_bytes(changed if each == path else content)
            what = f"{effective}: {mutation.__name__} in {path.suffix}"
            try:
                got = read(prefix)
                outcomes["harmless" if got == before else "wrong"] += 1
                if got != before:
                    failures.append(f"{what}: wrong tokens, silently")
            except DataError as error:
                outcomes["refused"] += 1
                if not any(file.name in str(error) or str(prefix) in str(error) for file in sound):
                    failures.append(f"{what}: no file named: {error}")
            except Exception as error:  # the promise is about one type
                failures.append(f"{what}: {type(error).__name__}: {error}")
            if path == pair[1] and mutation is flipped_bit:
                control_trials += 1
                caught += is_wrong_without_checks(prefix, before)
    return Result(
        promise="a changed dataset with hashes is refused with a DataError, or reads as before",
        trials=trials,
        asked=20_000,
        failures=failures,
        control="a reader that trusts every number: each flipped bit of the .bin is read as another text, silently",
        caught=caught,
        control_trials=control_trials,
        notes=", ".join(f"{count:,} {what}" for what, count in outcomes.items()),
    )


def is_wrong_without_checks(prefix: Path, before: tuple[bytes, bytes]) -> bool:
    """Whether the trusting reader takes a changed pair for another text, without a word."""
    try:
        return read_as_upstream(prefix) != before
    except (ValueError, KeyError, struct.error, OverflowError, MemoryError):
        return False
