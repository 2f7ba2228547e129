"""A short fine-tuning run, as the tests of what learns beside frozen weights share it."""

from __future__ import annotations

from pathlib import Path

import heron
from heron.data import conversations, template
from heron.data.packs import Packs


def settings_of(
    folder: Path, base: Path | str, data: Path, finetune: heron.FinetuneConfig, **changes
) -> heron.TrainConfig:
    """Four steps of two rows, in folder/run."""
    values = dict(
        model=str(base), data=str(data), out=str(folder / "run"), ctx_len=96, micro_bsz=2, max_steps=4, warmup_steps=1,
        lr_init=1e-2, weight_decay=0.0, threads=1, device="cpu", dtype="fp32", sample_tokens=4, finetune=finetune,
    )  # fmt: skip
    return heron.TrainConfig(**{**values, **changes})


def packs_of(config: heron.TrainConfig, val_fraction: float = 0.0) -> Packs:
    """The packs of its conversations, or of those for validation where there are some."""
    tokenizer = heron.tokenizer.load("bytes")
    data = conversations.load(config.data, tokenizer, config.ctx_len, template.load("rwkv"), val_fraction=val_fraction)
    return Packs(data.samples if not val_fraction else data.val_samples, config.ctx_len, 0, True)
