"""Weights in and out: `heron.load`, `heron.save`, and the checkpoints of a run."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from heron.checkpoint import run
from heron.checkpoint.architecture import UNUSED, config_of
from heron.checkpoint.atomic import new_file
from heron.checkpoint.formats import pth, safetensors
from heron.errors import CheckpointError
from heron.model import RWKV

__all__ = ["load", "read_tensors", "save", "weights_file"]

_FORMATS = {".pth": pth, ".safetensors": safetensors}


def load(path: str | Path, dtype: torch.dtype | None = None) -> RWKV:
    """A model from a file or a run, on the CPU.

    Args:
        path: a .pth or .safetensors file, a checkpoint folder, or a run folder (its newest whole checkpoint, else its
            rwkv-final.pth). Variant and every size are read from the tensors.
        dtype: convert the weights to this; None: as in the file.

    Raises:
        CheckpointError: missing, unreadable, damaged, or not a model of a known variant: the message names the file
            and the tensor.
    """
    source = weights_file(Path(path))
    tensors = read_tensors(source)
    config = config_of(tensors, source)
    with torch.device("meta"):
        model = RWKV(config)
    for name, parameter in model.state_dict().items():
        if name in UNUSED and name not in tensors:
            tensors[name] = torch.zeros(parameter.shape, dtype=tensors["blocks.0.att.w1"].dtype)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model's weights, dtypes as they are. The file appears whole or not at all.

    Args:
        model: an RWKV (or any module; `state_dict()` is what is written).
        path: ends in .pth (loads in upstream's tools) or .safetensors.

    Raises:
        CheckpointError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    form = _format(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with new_file(path) as temporary:
        form.write(tensors, temporary)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named CPU tensors of a .pth or .safetensors file, unchecked."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    return _format(path).read(path)


def weights_file(path: Path) -> Path:
    """The file of weights that `path` stands for: itself, or that of a checkpoint folder or a run folder.

    Warns of each checkpoint of a run that is damaged and passed over.
    """
    if not path.is_dir():
        return path
    if run.is_checkpoint(path):
        run.verify(path)
        return path / run.MODEL
    newest = run.newest(path, say=lambda text: warnings.warn(text, stacklevel=5))
    if newest is not None:
        return newest / run.MODEL
    if (path / "rwkv-final.pth").exists():
        return path / "rwkv-final.pth"
    raise CheckpointError(
        f"{path}: no weights here; wanted a run folder (checkpoints/step-*, rwkv-final.pth) or a checkpoint folder"
    )


def _format(path: Path) -> ModuleType:
    if path.suffix not in _FORMATS:
        raise CheckpointError(f"{path}: wanted a file name ending in {' or '.join(_FORMATS)}, got {path.suffix!r}")
    return _FORMATS[path.suffix]
