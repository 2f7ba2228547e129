"""Files as a checkpoint has them: on the disk, with their sha256 known, and never twice in memory."""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from heron.checkpoint.formats import safetensors

_NAMES = {dtype: name for name, dtype in safetensors.DTYPES.items()}
_SMALL = 1 << 20  # bytes that are put together before they are handed on
_BACKLOG = 1 << 28  # bytes that may be written but not hashed yet


class Writer:
    """Writes files onto the disk, and takes their sha256 in another thread meanwhile.

    Attributes:
        folder: where they go.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._behind: collections.deque[tuple[concurrent.futures.Future[None], int]] = collections.deque()
        self._bytes_behind = 0
        self._written: dict[str, tuple[int, Any]] = {}
        self._others: dict[str, dict[str, Any]] = {}

    def write(self, name: str, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
        """Write a new file and force it onto the disk."""
        digest, size = hashlib.sha256(), 0
        with open(self.folder / name, "xb") as file:
            for piece in pieces:
                self._behind.append((self._pool.submit(digest.update, piece), len(piece)))
                self._bytes_behind += len(piece)
                file.write(piece)
                size += len(piece)
                self._catch_up(_BACKLOG)
            file.flush()
            os.fsync(file.fileno())
        self._written[name] = size, digest

    def add(self, files: dict[str, dict[str, Any]]) -> None:
        """Count files that others have written, by what their :meth:`files` gives, among :meth:`files`."""
        self._others |= files

    def files(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of each file written so far."""
        self._catch_up(0)
        return self._others | {name: entry(size, digest) for name, (size, digest) in self._written.items()}

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def _catch_up(self, allowed: int) -> None:
        """Wait until at most `allowed` written bytes, which stay in memory until then, are still to be hashed."""
        while self._bytes_behind > allowed:
            future, size = self._behind.popleft()
            future.result()
            self._bytes_behind -= size


def entry(size: int, digest: Any) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": size, "sha256": digest.hexdigest()}


def serialized(tensors: dict[str, Tensor], metadata: Mapping[str, str] = {}) -> Iterator[bytearray | memoryview]:
    """A .safetensors file piece by piece: no second copy of all the weights is ever made.

    Args:
        metadata: more of it, for the header.

    Source of the format: huggingface/safetensors, README. Wide types come first so that each begins at a multiple of
    its size, as the format's readers want it.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    small = bytearray(len(text).to_bytes(8, "little") + text)
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().data
        if len(small) + len(raw) < _SMALL:
            small += raw
            continue
        yield small
        yield raw
        small = bytearray()
    yield small
