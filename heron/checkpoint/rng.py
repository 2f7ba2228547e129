"""The random generators of a process as tensors: Python's, NumPy's, PyTorch's on the CPU and on each GPU."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heron.errors import CheckpointError

_NAMES = ("torch", "python", "python_gauss", "numpy", "numpy_position", "numpy_gauss", "cuda_devices")


def tensors() -> dict[str, Tensor]:
    """Where all generators are now; CheckpointError for generators of an unknown kind."""
    version, internal, gauss = random.getstate()
    drawn: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = drawn
    if version != 3 or name != "MT19937":
        raise CheckpointError(f"unknown random generators: python version {version}, numpy {name}")
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "cuda_devices": torch.tensor([len(devices)], dtype=torch.int64),
        **{f"cuda.{i}": state for i, state in enumerate(devices)},
    }


def names(saved: Mapping[str, Tensor]) -> list[str]:
    """The names that :func:`tensors` gives on a machine with as many GPUs as `saved` was written on."""
    return [*_NAMES, *(f"cuda.{i}" for i in range(int(saved["cuda_devices"]) if "cuda_devices" in saved else 0))]


def restore(saved: Mapping[str, Tensor]) -> None:
    """Put all generators where they were, on as many GPUs as there are."""
    torch.set_rng_state(saved["torch"])
    gauss = saved["python_gauss"].tolist()
    random.setstate((3, tuple(saved["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = saved["numpy_position"].tolist()
    keys = saved["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, saved["numpy_gauss"].item()))
    if torch.cuda.is_initialized():
        for i in range(min(int(saved["cuda_devices"]), torch.cuda.device_count())):
            torch.cuda.set_rng_state(saved[f"cuda.{i}"], i)
