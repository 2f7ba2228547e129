"""safetensors: the same names and tensors as the .pth, without pickle."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor

from heron import strict_json
from heron.checkpoint.formats import LONGEST_NAME, MOST_TENSORS, wrappers
from heron.errors import CheckpointError

LARGEST_HEADER = 1 << 21  # bytes
_METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read(path: Path) -> dict[str, Tensor]:
    """Named tensors of a .safetensors file, in memory of their own: the file may change while they live.

    Raises:
        CheckpointError: see :func:`mapped`.
    """
    return {name: tensor.clone() for name, tensor in mapped(path).items()}


def mapped(path: Path) -> dict[str, Tensor]:
    """The same in the file itself, of which only what is used is read.

    Raises:
        CheckpointError: the file is damaged, or its header announces something else than named tensors of a known
            dtype that fill the rest of the file one after another.
    """
    try:
        announced = _announced(path)
        loaded = load_file(path) if _is_utf8(path) else load_bytes(path.read_bytes())
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable .safetensors file: {error}") from error
    for name in announced.keys() | loaded.keys():
        got = loaded.get(name)
        if got is None or (got.dtype, tuple(got.shape)) != announced.get(name):
            raise CheckpointError(f"{path}: {name!r}: the library reads another tensor than the header announces")
    return loaded


def read_plain(path: Path) -> dict[str, Tensor]:
    """As :func:`read`, names without what wrappers put in them (:mod:`heron.checkpoint.formats.wrappers`)."""
    return unwrapped(read(path), path)


def unwrapped(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The tensors of one model without what wrappers put in their names; CheckpointError where two become one."""
    try:
        plain = wrappers.unwrapped(tensors)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return {rest: tensors[name] for name, rest in plain.items()}


def names(path: Path) -> list[str]:
    """The names in a file that :func:`read` has read."""
    return list(_announced(path))


def metadata(path: Path) -> dict[str, str]:
    """What a file says about itself; CheckpointError if it can't be read."""
    try:
        if not _is_utf8(path):
            return _header(path)[0].get(_METADATA, {})
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable .safetensors file: {error}") from None


def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write named tensors, with `metadata` beside the usual format "pt"; OSError when the disk refuses."""
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _announced(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor by the header; ValueError when that does not describe the file to the byte."""
    header, data_bytes = _header(path)
    header.pop(_METADATA, None)
    if len(header) > MOST_TENSORS:
        raise ValueError(f"wanted at most {MOST_TENSORS:,} tensors, got {len(header):,}")
    regions = sorted((*_region(name, entry), name) for name, entry in header.items())
    last = 0
    for begin, end, name in regions:
        if begin != last:
            raise ValueError(f"{name!r}: wanted it at byte {last:,} of the data, got {begin:,}")
        last = end
    if last != data_bytes:
        raise ValueError(f"wanted {last:,} bytes of data, got {data_bytes:,}")
    return {name: (DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()}


def _is_utf8(path: Path) -> bool:
    """Whether the library can open a file of this name."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a file says it holds, and how many bytes of data follow; ValueError where that is no header.

    Source of the format: huggingface/safetensors, README.
    """
    with open(path, "rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(LARGEST_HEADER, file_bytes - 8):
            raise ValueError(f"a header of {header_bytes:,} bytes in a file of {file_bytes:,}: no such file, or cut")
        text = file.read(header_bytes)
    if not text.startswith(b"{"):
        raise ValueError("its header does not begin with '{'")
    header = strict_json.loads(text)
    metadata = header.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_METADATA!r}: wanted texts by name")
    return header, file_bytes - 8 - header_bytes


def _region(name: str, entry: Any) -> tuple[int, int]:
    """Where the data of a tensor begin and end, which its shape and dtype must confirm."""
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(f"wanted names of at most {LONGEST_NAME} printable characters, got {name[:80]!r}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r}: wanted dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"{name!r}: wanted a dtype of {', '.join(DTYPES)}, got {str(entry['dtype'])[:40]!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > 8 or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r}: shape {str(shape)[:80]} with data_offsets {str(offsets)[:80]}")
    needed = math.prod(shape) * DTYPES[entry["dtype"]].itemsize
    if offsets[1] - offsets[0] != needed:
        raise ValueError(f"{name!r}: {entry['dtype']} {shape} needs {needed:,} bytes, got {offsets[1] - offsets[0]:,}")
    return offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
