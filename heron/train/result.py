"""What a finished run leaves beside its checkpoints: a model, or what was trained beside a frozen one."""

from __future__ import annotations

import shutil
from pathlib import Path

from heron.checkpoint import STATE, ownership, save, save_tuned_state
from heron.checkpoint.adapters import FOLDER, save_adapter
from heron.model import RWKV
from heron.optim import RowAdamW
from heron.train.base_model import Base
from heron.train.step import Learner


def write(out: Path, learner: Learner, base: Base | None, model: RWKV) -> Path:
    """Write `adapter/`, `state.pth` or `rwkv-final.pth` into a run folder, over one that the run wrote earlier.

    Args:
        base: the frozen weights; None: all of them were trained.
        model: the learner's, whole.

    Returns:
        What was written.

    Raises:
        CheckpointError: it cannot be written; a number in it is not finite.
    """
    fingerprint, leaves = None if base is None else base.fingerprint, learner.leaves
    if leaves.adapter is not None:
        folder, older = out / FOLDER, out / f".trash-{FOLDER}"
        shutil.rmtree(older, ignore_errors=True)
        if folder.exists():
            folder.rename(older)
        row_ids = learner.optimizer.stepped() if isinstance(learner.optimizer, RowAdamW) else None
        save_adapter(leaves.adapter, folder, fingerprint, leaves.trained.state_dict(), row_ids)
        shutil.rmtree(older, ignore_errors=True)
        return folder
    path = out / (ownership.FINAL if leaves.state is None else STATE)
    with ownership.writing(path):
        if leaves.state is None:
            save(model, path)
        else:
            save_tuned_state(leaves.state, path, fingerprint)
    return path
