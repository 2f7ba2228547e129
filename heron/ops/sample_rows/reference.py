"""The definition of sample_rows: sorted rows and exact integers, in PyTorch on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = 42  # of a weight below its point: V of them, V up to 2^20, fit int64
LOG2_E = 1 / math.log(2)
LARGEST_SCALE = torch.finfo(torch.float32).max
# 2^-f = 1 + f (P[0] + f (P[1] + ...)) for f in [0, 1), of the least greatest relative error, 2e-9 before rounding.
POWER = tuple(
    map(
        float.fromhex,
        ("-0x1.62e42cp-1", "0x1.ebfac0p-3", "-0x1.c6948ep-5", "0x1.39e3fcp-7", "-0x1.4e2ae8p-10", "0x1.c946cap-14"),
    )
)


def sample_rows_reference(
    logits: Tensor, counts: Tensor | None, barred: Tensor, settings: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition; see :func:`heron.ops.sample_rows`. fp64 logits are worked on in fp64."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    vocab_size = logits.shape[1]
    temperature, top_p, top_k, presence, frequency = settings.unsqueeze(2).unbind(1)
    allowed = logits
    if counts is not None:
        allowed = logits - presence.to(logits) * (counts > 0) - frequency.to(logits) * counts
    allowed = allowed.masked_fill(barred, -math.inf)
    largest = allowed.amax(dim=1, keepdim=True)
    distance = torch.where(allowed > -math.inf, largest - allowed, math.inf)  # fp32: of equals the lower id goes first

    mass = weights(distance, torch.full_like(temperature, LOG2_E))
    order = distance.sort(dim=1, stable=True).indices
    sorted_mass = mass.gather(1, order)
    before = sorted_mass.cumsum(dim=1) - sorted_mass
    wanted = (top_p * sorted_mass.sum(dim=1, keepdim=True)).ceil().long()
    rank = torch.arange(vocab_size, device=logits.device)
    kept = ((top_p >= 1) | (before < wanted)) & ((top_k == 0) | (rank < top_k))
    kept = torch.zeros_like(kept).scatter(1, order, kept)

    greedy = (temperature == 0) | (top_p == 0) | (top_k == 1)
    tempered = torch.where(kept, weights(distance, LOG2_E / torch.where(greedy, 1, temperature)), 0)
    reached = tempered.cumsum(dim=1)
    total = reached[:, -1:]
    point = torch.minimum((uniforms.unsqueeze(1) * total).long(), total - 1)
    drawn = (reached <= point).sum(dim=1, keepdim=True)
    likeliest = torch.where(allowed == largest, rank, vocab_size).amin(dim=1, keepdim=True)
    ids = torch.where(greedy, likeliest, drawn)

    finite = logits.amax(dim=1, keepdim=True).isfinite() & largest.isfinite()
    ids = torch.where(finite, ids, 0)
    logprobs = logits.log_softmax(dim=1).gather(1, ids)
    return torch.where(finite, ids, -1).squeeze(1), logprobs.float().squeeze(1)


def weights(distance: Tensor, scale: Tensor) -> Tensor:
    """``2^(-distance scale)``, 2^BITS for 1, rounded down: int64, the same on every device, by exact operations alone.

    Args:
        distance: (n, V) fp32 or fp64, at least 0; infinite where a token is barred.
        scale: (n, 1) fp64, at least 0.
    """
    exponent = distance * scale.clamp(max=LARGEST_SCALE).to(distance)
    exponent = torch.where(exponent < BITS + 1, exponent, BITS + 1)  # inf x 0 too
    whole = exponent.floor()
    part = exponent - whole
    power = torch.full_like(part, POWER[-1])
    for coefficient in POWER[-2::-1]:
        power = power * part + coefficient
    power = power * part + 1
    return (power * 2**BITS).long() >> whole.long()
