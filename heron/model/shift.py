"""What stands before the projections of each half of a block: the sum with the branch before, a norm, token shift.

Before the first block and behind the last there is the norm alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heron import ops
from heron.model.plain import holds_tensors, is_plain
from heron.ops.shift_mix import shift_mix_choice, shift_mix_reference
from heron.ops.spans import Span, last_before


def normed_and_mixed(
    norm: nn.Module,
    span: Span | None,
    x: Tensor,
    branch: Tensor | None,
    mixes: list[Tensor],
    last: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """:func:`heron.ops.shift_mix` with a norm, which is called where it is not plain.

    A `span` gets the token before it from its neighbour.
    """
    if span is not None:
        latest = x[:, -1] if branch is None else x[:, -1] + branch[:, -1]
        n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        last = last_before(span, norm(latest), last, n_seq)
    if is_plain(norm, nn.LayerNorm):
        return ops.shift_mix(x, branch, norm.weight, norm.bias, mixes, last, cu_seqlens, norm.eps)
    return shift_mix_reference(x, branch, None, None, mixes, last, cu_seqlens, 0.0, norm)


class Norm(nn.LayerNorm):
    """A layer norm that computes as :func:`normed` does when it is called, too, as one with hooks is: a sharded one."""

    def forward(self, x: Tensor) -> Tensor:
        return _normed(self, x, None) if holds_tensors(self) else super().forward(x)


def normed(norm: nn.Module, x: Tensor, branch: Tensor | None = None) -> Tensor:
    """``norm(x + branch)`` (B, T, C). For gradients by the kernels of :func:`heron.ops.shift_mix`, where they run: they
    read and write less than PyTorch's. A norm that is not plain is called.
    """
    if is_plain(norm, nn.LayerNorm) or is_plain(norm, Norm):
        return _normed(norm, x, branch)
    return norm(x if branch is None else x + branch)


def _normed(norm: nn.LayerNorm, x: Tensor, branch: Tensor | None) -> Tensor:
    learns = torch.is_grad_enabled() and x.dim() == 3 and norm.weight.dtype == x.dtype
    if learns and shift_mix_choice(x.device, x.dtype, x.shape[-1]).impl == "cuda":
        nothing_of_the_token_before = torch.zeros_like(norm.weight)
        return ops.shift_mix(x, branch, norm.weight, norm.bias, [nothing_of_the_token_before], eps=norm.eps)[1][0]
    return nn.LayerNorm.forward(norm, x if branch is None else x + branch)
