"""What single sequences ask of drawing beyond their sampling: biases, a constraint, the likeliest tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from heron.errors import HeronError
from heron.generation.constraint import Constraint, may_follow
from heron.generation.sampling import Token
from heron.generation.sending import sent


@dataclasses.dataclass(frozen=True, eq=False)
class Extras:
    """What one sequence asks for, see :class:`heron.generation.Request`."""

    bias: Mapping[int, float]
    constraint: Constraint | None
    ends: Sequence[int]  # ids that end the text
    n_likeliest: int  # how many of the likeliest tokens come with each token


class StepExtras:
    """What the sequences of a step ask for, side by side; the same sequences need one for all their steps.

    Args:
        asking: the rows of the logits whose sequences ask for something, and for what.
        barred: (V,) bool on the device of the logits, ids that are never drawn or listed.
    """

    def __init__(self, asking: Sequence[tuple[int, Extras]], barred: Tensor):
        self._asking, self._barred, device = list(asking), barred, barred.device
        self._is_cuda = device.type == "cuda"
        self._rows = sent([row for row, _ in asking], device)
        biases = [(row, token, value) for row, one in asking for token, value in one.bias.items()]
        self._biased = None
        if biases:
            rows, ids, values = zip(*biases, strict=True)
            self._biased = sent(rows, device), sent(ids, device)
            self._bias = sent(values, device, torch.float32)
        self._constrained = [(row, one.constraint, one.ends) for row, one in asking if one.constraint is not None]
        self._errors: dict[int, HeronError] = {}  # of the rows whose constraint failed at this step
        if self._constrained:
            self._constrained_rows = sent([row for row, _, _ in self._constrained], device)
            self._bars = torch.zeros(len(self._constrained), len(barred), dtype=torch.bool, pin_memory=self._is_cuda)
        self._n_likeliest = min(max(one.n_likeliest for _, one in asking), len(barred))
        sizes = len(asking), self._n_likeliest
        self._likeliest = torch.zeros(sizes, dtype=torch.int64, pin_memory=self._is_cuda)
        self._logprobs = torch.zeros(sizes, pin_memory=self._is_cuda)

    def shaped(self, logits: Tensor) -> Tensor:
        """Logits (n, V) with biases added, and -inf where a constraint bars a token: a copy in at least fp32."""
        self._errors = {}
        if self._biased is None and not self._constrained:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        if self._biased is not None:
            logits[self._biased] += self._bias.to(logits.dtype)
        if self._constrained:
            for bars, (row, constraint, ends) in zip(self._bars, self._constrained, strict=True):
                try:
                    torch.logical_not(may_follow(constraint, ends, len(bars)), out=bars)
                except HeronError as error:
                    self._errors[row] = error
                    bars.zero_()
            bars = self._bars.to(logits.device, non_blocking=True)
            logits[self._constrained_rows] = logits[self._constrained_rows].masked_fill(bars, -math.inf)
        return logits

    def rank(self, logits: Tensor, ids: Tensor, logprobs: Tensor) -> None:
        """Put the log-probabilities that `logits` (n, V) give `ids` (n,) into the asking rows of `logprobs` (n,), and
        start the copy of the likeliest tokens to the host."""
        ranked = logits[self._rows].float().log_softmax(dim=1)
        logprobs[self._rows] = ranked.gather(1, ids[self._rows].clamp(min=0).unsqueeze(1)).squeeze(1)
        if self._n_likeliest:
            values, likeliest = ranked.masked_fill_(self._barred, -math.inf).topk(self._n_likeliest, dim=1)
            self._logprobs.copy_(values, non_blocking=True)
            self._likeliest.copy_(likeliest, non_blocking=True)

    def settled(self, drawn: Sequence[Token | HeronError]) -> list[Token | HeronError]:
        """What was drawn, one a row, once it is on the host: with the likeliest tokens, and constraints moved on.

        An error stands in the place of a token where a constraint failed.
        """
        settled = list(drawn)
        for i, (row, one) in enumerate(self._asking):
            token = settled[row] = self._errors.get(row, settled[row])
            if isinstance(token, HeronError):
                continue
            if one.n_likeliest and not token.top:
                pairs = zip(self._likeliest[i].tolist(), self._logprobs[i].tolist(), strict=True)
                settled[row] = token._replace(top=_in_order(pairs, one.n_likeliest))
            if one.constraint is not None and token.id not in one.ends:
                try:
                    one.constraint.accept(token.id)
                except HeronError as error:
                    settled[row] = error
        return settled


def likeliest(logprobs: np.ndarray, barred: np.ndarray, n: int) -> tuple[tuple[int, float], ...]:
    """The `n` likeliest ids that are not `barred`, with their logprobs (V,), the likeliest first."""
    logprobs = np.where(barred, -math.inf, logprobs)
    last = np.partition(logprobs, -min(n, len(logprobs)))[-min(n, len(logprobs))]
    ids = np.flatnonzero(logprobs >= last)
    return _in_order(zip(ids.tolist(), logprobs[ids].tolist(), strict=True), n)


def _in_order(pairs: Iterable[tuple[int, float]], n: int) -> tuple[tuple[int, float], ...]:
    """The first `n`, the likeliest first and of equals the lower id; none that is impossible."""
    possible = [pair for pair in pairs if pair[1] > -math.inf]
    return tuple(sorted(possible, key=lambda pair: (-pair[1], pair[0]))[:n])
