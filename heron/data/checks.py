"""What was found out about a binidx pair, kept beside it in `NAME.checks.json`: hashes of blocks, the range of ids.

Hashes are there when `heron prepare --hashes` took them. They are compared when the pair is opened for the first time
and whenever size or time of a file have changed since. The range of ids of a large pair is kept so that not every start
has to read all of it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from heron import strict_json
from heron.errors import CheckpointError, DataError
from heron.files import new_file

BLOCK = 1 << 26  # bytes under one hash
_FORMAT = 1
_THREADS = 4
_LARGEST = 1 << 26  # bytes of the file itself

Pair = tuple[Path, Path]  # .idx, .bin


@dataclasses.dataclass(frozen=True)
class Checks:
    """What is known about a pair.

    Attributes:
        hashes: sha256 of each block of `block` bytes of the .idx and of the .bin; None: they were not taken.
        block: bytes under one hash.
        seen: [bytes, time of change in ns] of both files when this was last true of them; None: not compared yet.
        ids: lowest and highest id; None: not looked for.
    """

    hashes: list[list[str]] | None = None
    block: int = BLOCK
    seen: list[list[int]] | None = None
    ids: list[int] | None = None


def path_for(pair: Pair) -> Path:
    """The `NAME.checks.json` of a pair."""
    return pair[0].with_suffix(".checks.json")


def read(pair: Pair) -> Checks | None:
    """What is kept about a pair, or None; DataError when the file is damaged."""
    path = path_for(pair)
    try:
        if not path.exists():
            return None
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"wanted at most {_LARGEST:,} bytes")
        fields = strict_json.loads(path.read_bytes())
        found = Checks(**{name: fields[name] for name in ("hashes", "block", "seen", "ids")})
        if fields != _sealed(found):
            raise ValueError("its own sha256 does not confirm it")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged: {error}; delete it if the pair beside it is known to be good") from None
    return found


def write(pair: Pair, checks: Checks) -> None:
    """Keep `checks` beside the pair, whole or not at all; CheckpointError when the folder refuses."""
    with new_file(path_for(pair)) as temporary:
        write_to(temporary, checks)


def write_to(path: Path, checks: Checks) -> None:
    """Write a file of `checks` and force it onto the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(_sealed(checks), file)
        file.flush()
        os.fsync(file.fileno())


def taken(pair: Pair) -> Checks:
    """Fresh hashes of the two files, at whatever names they have."""
    return Checks([_hashes(path, BLOCK) for path in pair], BLOCK)


def confirm(pair: Pair, verify: bool = False) -> Checks:
    """What is known about a pair as it is now.

    Hashes that were taken are compared unless the files look as they did last time, or if `verify` asks for it.

    Raises:
        DataError: a block is not what its hash says (file and bytes are named), or the kept file is damaged.
    """
    checks = read(pair) or Checks()
    looks = _looks(pair)
    if checks.seen == looks and not (verify and checks.hashes):
        return checks
    if checks.hashes is None:
        return Checks(seen=looks)
    for path, wanted in zip(pair, checks.hashes, strict=True):
        got = _hashes(path, checks.block)
        for i in range(max(len(got), len(wanted))):
            if got[i : i + 1] != wanted[i : i + 1]:
                begin = i * checks.block
                raise DataError(
                    f"{path}: bytes {begin:,} to {min(begin + checks.block, path.stat().st_size):,} are not what "
                    f"their sha256 in {path_for(pair).name} says: the file was damaged or changed; make it again, or "
                    f"delete {path_for(pair).name} if it was changed on purpose"
                )
    checks = dataclasses.replace(checks, seen=looks)
    _keep(pair, checks)
    return checks


def remember_ids(pair: Pair, checks: Checks, lowest: int, highest: int) -> None:
    """Keep the range of ids of a pair that was confirmed as `checks`."""
    _keep(pair, dataclasses.replace(checks, ids=[lowest, highest]))


def _keep(pair: Pair, checks: Checks) -> None:
    try:
        write(pair, checks)
    except CheckpointError as error:
        warnings.warn(f"{error}; the data will be read through at each start", stacklevel=3)


def _looks(pair: Pair) -> list[list[int]]:
    return [[path.stat().st_size, path.stat().st_mtime_ns] for path in pair]


def _hashes(path: Path, block: int) -> list[str]:
    if path.stat().st_size == 0:
        return []
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    pieces = (raw[begin : begin + block] for begin in range(0, len(raw), block))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(lambda piece: hashlib.sha256(piece).hexdigest(), pieces))


def _sealed(checks: Checks) -> dict[str, Any]:
    fields = {"format": _FORMAT, **dataclasses.asdict(checks)}
    return {**fields, "sha256": hashlib.sha256(json.dumps(fields).encode()).hexdigest()}
