"""The kernels that a use of a GPU needs, built in the background from the first moment that it is known.

All are built at once, while data are read, the model is made and the compiler works; whoever uses one waits for that
one alone. On a CPU, whose code is built in a moment, there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from heron.ops._choice import NativeForm
from heron.ops.adamw import cuda as adamw
from heron.ops.few_rows import cuda as few_rows
from heron.ops.fp8_linear import cuda as fp8_linear
from heron.ops.global_norm import cuda as global_norm
from heron.ops.head_mix import cuda as head_mix
from heron.ops.head_step import cuda as head_step
from heron.ops.linear_cross_entropy import cuda as linear_cross_entropy
from heron.ops.matvec import cuda as matvec
from heron.ops.norm_mix import cuda as norm_mix
from heron.ops.rosa import cuda as rosa
from heron.ops.rosa import device_stream, soft
from heron.ops.rows import cuda as rows
from heron.ops.sample_rows import cuda as sample_rows
from heron.ops.shift_mix import cuda as shift_mix
from heron.ops.squared_relu_product import cuda as squared_relu_product
from heron.ops.token_step import cuda as token_step
from heron.ops.wkv7 import cuda as wkv7

SEQUENCES = (wkv7.FORM, head_mix.FORM, shift_mix.FORM)  # the slowest first
TRAINING = (*SEQUENCES, squared_relu_product.FORM, linear_cross_entropy.FORM, adamw.FORM, global_norm.FORM, rows.FORM)
DECODING = (token_step.FORM, sample_rows.FORM, head_step.FORM, norm_mix.FORM, matvec.FORM, few_rows.FORM)
TABLES, STREAMS, FP8 = rows.FORM, device_stream.FORM, fp8_linear.FORM
ROSA = (rosa.FORM, soft.FORM)
ALL = (*TRAINING, *DECODING, *ROSA, STREAMS, FP8)


def build_for_training(device: torch.device, in_fp8: bool = False) -> None:
    """Begin with what a training step of any model runs, `in_fp8` or not."""
    _begin((*TRAINING, FP8) if in_fp8 else TRAINING, device)


def build_for_decoding(device: torch.device) -> None:
    """Begin with what reads a prompt and decodes."""
    _begin((*DECODING, *SEQUENCES), device)


def build_all(device: torch.device) -> dict[str, str]:
    """Build every kernel, side by side, and wait for them.

    Returns:
        What each is for, and why it could not be built; empty where all are there, and on a CPU.
    """
    _begin(ALL, device)
    failed = {form.what: form.why_not_built(device) for form in ALL} if device.type == "cuda" else {}
    return {what: reason for what, reason in failed.items() if reason is not None}


def _begin(forms: Sequence[NativeForm], device: torch.device) -> None:
    if device.type == "cuda":
        for form in forms:
            form.begin(device)
