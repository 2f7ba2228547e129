"""Rows of tables on a CUDA device or in pinned memory, all tables in one launch (csrc/rows.cu); built at first use."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from heron.ops import _build, _choice
from heron.ops.rows.cpu import CSRC, why_not

BUS_BLOCKS = 4  # of a copy over the bus: enough to fill it, and the other processors compute on


def copy_rows(
    sources: Sequence[Tensor],
    from_rows: Tensor | None,
    targets: Sequence[Tensor],
    to_rows: Tensor | None,
    blocks: int = 0,
) -> None:
    """``target[to_rows[i]] = source[from_rows[i]]`` for each pair of tables; starts a kernel of the current stream.

    Args:
        sources: (rows, width) each, of any width and dtype, on the CUDA device or in pinned memory of the host.
        from_rows: (n,) int64 on the device, not checked; None: row i.
        targets: as the sources, which they share widths and dtypes with, one by one; not the same memory.
        to_rows: (n,) int64 on the device, all different, not checked; None: row i.
        blocks: at most so many blocks of 512 threads; 0: all that the device has room for.
    """
    torch.ops.heron.copy_rows(sources, from_rows, targets, to_rows, blocks)


def row_adamw_(
    weights: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    row_steps: Sequence[Tensor],
    gradients: Sequence[Tensor],
    ids: Tensor,
    weight_rows: Tensor | None,
    moment_rows: Tensor | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    found_inf: Tensor | None,
) -> None:
    """The step of :func:`heron.ops.rows.row_adamw_` for some rows of many tables, on the current stream.

    Args:
        weights: fp32, on the CUDA device or in pinned memory of the host.
        exp_avgs, exp_avg_sqs: fp32 or bf16, there too.
        row_steps: (V,) int32.
        gradients: (n, width) fp32, of one table each.
        ids: (n,) int64 on the device, all different, not checked: whose rows these are, by which steps are counted.
        weight_rows, moment_rows: (n,) int64: where in `weights` and in the moments they lie; None: row i.
        found_inf: an fp32 scalar on the device; where it is not 0 nothing is changed.
    """
    torch.ops.heron.row_adamw_(
        weights, exp_avgs, exp_avg_sqs, row_steps, gradients, ids, weight_rows, moment_rows, lr, *betas, eps, found_inf
    )


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernels for devices of this compute capability.

    Raises:
        KernelError: they can't be built here, or the device is older than 8.0.
    """
    _build.load_kernels_for(capability, "rows", "rows", [CSRC / "rows.cu", CSRC / "gate.cu"], [CSRC / "rows.h"])


FORM = _choice.NativeForm("rows", "cuda", "the tables' rows", why_not, library)
