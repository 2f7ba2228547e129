"""safetensors: the same names and tensors as the .pth, without pickle."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from heron.errors import CheckpointError


def read(path: Path) -> dict[str, Tensor]:
    """Named tensors of a .safetensors file, in memory of their own: the file may change while they live."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable .safetensors file: {error}") from error


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write named tensors; OSError when the disk refuses."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
