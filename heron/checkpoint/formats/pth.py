"""The upstream format: a `.pth` with a flat dict of named tensors."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from heron.errors import CheckpointError

_ZERO3_PREFIX = "_forward_module."  # left in the names by DeepSpeed ZeRO-3 saves


def read(path: Path) -> dict[str, Tensor]:
    """Named tensors of a .pth, read with `weights_only=True` so that no code in the file can run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a foreign file can fail anywhere in the reader; every failure means the same
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not a readable .pth of weights: {first_line}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: wanted a dict of named tensors, got {type(content).__name__}")
    tensors = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: wanted named tensors only, got {name!r}: {type(value).__name__}")
        # a copy of its own: the file may be replaced or deleted while the model lives
        tensors[name.removeprefix(_ZERO3_PREFIX)] = value.clone()
    return tensors


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write named tensors as upstream's tools expect them; OSError when the disk refuses."""
    try:
        with open(path, "wb") as file:
            torch.save(tensors, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # PyTorch's writer covers the disk's error with one of its own
            raise error.__context__ from None
        raise
