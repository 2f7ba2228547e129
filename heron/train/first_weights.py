"""The weights that a fresh run begins with: those of a file, or initial values and what is laid over them."""

from __future__ import annotations

from pathlib import Path

import torch

from heron.checkpoint import load, read_tensors
from heron.checkpoint.architecture import lay_over
from heron.config import ModelConfig, TrainConfig
from heron.errors import CheckpointError
from heron.model import RWKV
from heron.model.init import round_to_bf16
from heron.train import base_model


def read(start: Path, model: ModelConfig | str) -> RWKV:
    """The model in a file that a run starts from; CheckpointError, with what to do about it, where it is none.

    Args:
        model: as the config has it: sizes mean that the file was found in the run folder.
    """
    try:
        return load(start, dtype=torch.float32)
    except CheckpointError as error:
        if not isinstance(model, ModelConfig):
            raise
        raise CheckpointError(
            f"{error}; a run starts from the newest weights in its folder: move this file away, or name another "
            "with --model"
        ) from None


def finish(model: RWKV, start: Path | None, config: TrainConfig) -> str:
    """Finish what a fresh run starts from; gives the words for the header.

    Args:
        model: with the weights of the file `start`, or with initial values where that is None.

    Raises:
        CheckpointError: weights in the run folder beside those of `init_from`, or ones that don't fit the model.
    """
    if start is not None:
        return base_model.what_it_lacks(start)
    words = f"initial values in {config.init_dtype}, seed {config.seed}"
    if config.init_dtype == "bf16":
        round_to_bf16(model)
    if not config.init_from:
        return words
    base = base_model.named(Path(config.out), config.init_from, "--init_from")
    missing = lay_over(model, read_tensors(base), base)
    if not missing:
        return base_model.what_it_lacks(base)
    names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    return f"{base}; it lacks {len(missing)} tensors, which have their {words}: {names}"
