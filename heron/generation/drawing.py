"""The next tokens of an engine's rows, drawn on the device that holds their logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heron.generation.sampling import Sampling, check_finite, fade, increments
from heron.generation.text import stand_for_something
from heron.ops import sample_rows
from heron.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What stays the same from step to step while the same rows are open, n of them; tensors on the device."""

    rows: list[tuple[int, Sampling]]
    numbers: Tensor  # (n,) int64
    settings: Tensor  # (n, 5) fp64
    decay: Tensor | None  # (rows, 1) fp32, of every row that the engine has; None: no row has penalties
    rules: Tensor  # (n,) int64, the row of `increments` that each counts by


class DeviceDraws:
    """Draws with :func:`heron.ops.sample_rows`: the settings and the occurrences of tokens are kept on the device.

    Args:
        tokenizer: ids that stand for nothing in it are never drawn.
        rows: sequences that can be open at once.
        device: where the logits are.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int, device: torch.device):
        self._tokenizer, self._rows, self._device = tokenizer, rows, device
        self._barred = barred_ids(tokenizer).to(device)
        self._counts: Tensor | None = None  # (rows, V) fp32, once a row has penalties
        self._plan: _Plan | None = None
        is_cuda = device.type == "cuda"
        self._uniforms = torch.zeros(rows, dtype=torch.float64, pin_memory=is_cuda)
        self._uniforms_there = torch.zeros(rows, dtype=torch.float64, device=device)
        self._ids = torch.zeros(rows, dtype=torch.int64, pin_memory=is_cuda)
        self._logprobs = torch.zeros(rows, pin_memory=is_cuda)
        self._arrived = torch.cuda.Event() if is_cuda else None

    def keep(self, row: int, counts: Tensor) -> Tensor:
        """The occurrences (V,) of `row`, on the device, with these values to begin with; draws update them."""
        if self._counts is None:
            self._increments = increments(self._tokenizer).to(self._device)
            self._counts = torch.zeros(self._rows, len(self._barred), device=self._device)
        return self._counts[row].copy_(counts)

    @torch.inference_mode()
    def draw(
        self,
        rows: Sequence[tuple[int, Sampling]],
        generators: Sequence[torch.Generator],
        logits: Tensor,
        meanwhile: Callable[[Tensor], None] | None = None,
    ) -> list[tuple[int, float]]:
        """A token id and its log-probability for each of `rows` (its number and its settings).

        Args:
            generators: of the CPU, one a row; not advanced where the row is greedy.
            logits: (n, V) of the tokenizer's ids, on the device. They may still be being computed: the host waits once,
                for the tokens.
            meanwhile: called with the ids (n,) on the device, -1 where a row could not be drawn, before the host waits
                for them. It may overwrite the logits.

        Raises:
            HeronError: the largest logit of a row is NaN or infinite.
        """
        plan = self._plan_of(list(rows))
        uniforms = [
            0.0 if sampling.greedy else torch.rand((), generator=generator, dtype=torch.float64).item()
            for (_, sampling), generator in zip(rows, generators, strict=True)
        ]
        counts = None
        if plan.decay is not None:
            in_order = [number for number, _ in rows] == list(range(self._rows))
            counts = self._counts if in_order else self._counts[plan.numbers]
        n = len(rows)
        self._uniforms.numpy()[:n] = uniforms
        self._uniforms_there.copy_(self._uniforms, non_blocking=True)
        ids, logprobs = sample_rows(logits, counts, self._barred, plan.settings, self._uniforms_there[:n])
        self._send(ids, logprobs)
        if meanwhile is not None:
            logits = logits.clone()
            meanwhile(ids)
        drawn = self._receive(n)
        for i, (token, _) in enumerate(drawn):
            if token < 0:
                check_finite(logits[i])
                allowed = logits[i] if counts is None else rows[i][1].penalised(logits[i], counts[i])
                check_finite(allowed.masked_fill(self._barred, -math.inf))
        if plan.decay is not None:
            fade(self._counts, plan.decay)
            self._counts[plan.numbers, ids] += self._increments[plan.rules, ids]
        return drawn

    def _send(self, ids: Tensor, logprobs: Tensor) -> None:
        """Start the copy of ids (n,) and logprobs (n,) to the host."""
        self._ids[: len(ids)].copy_(ids, non_blocking=True)
        self._logprobs[: len(ids)].copy_(logprobs, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def _receive(self, n: int) -> list[tuple[int, float]]:
        """Both, row by row. The wait for them frees every buffer of this draw on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return list(zip(self._ids[:n].tolist(), self._logprobs[:n].tolist(), strict=True))

    def _plan_of(self, rows: list[tuple[int, Sampling]]) -> _Plan:
        if self._plan is None or self._plan.rows != rows:
            numbers = [number for number, _ in rows]
            settings = [(s.temperature, s.top_p, s.top_k, s.presence_penalty, s.frequency_penalty) for _, s in rows]
            decay = None
            if any(sampling.has_penalties for _, sampling in rows):
                decay = torch.ones(self._rows, 1)
                decay[numbers, 0] = torch.tensor([sampling.penalty_decay for _, sampling in rows])
                decay = decay.to(self._device)
            self._plan = _Plan(
                rows,
                torch.tensor(numbers, device=self._device),
                torch.tensor(settings, dtype=torch.float64, device=self._device),
                decay,
                torch.tensor([int(sampling.count_digits) for _, sampling in rows], device=self._device),
            )
        return self._plan


def barred_ids(tokenizer: Tokenizer) -> Tensor:
    """(V,) bool, on the CPU: the ids that stand for nothing, found in few calls where they are few."""
    barred = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    unknown = [range(tokenizer.vocab_size)]
    while unknown:
        ids = unknown.pop()
        if stand_for_something(tokenizer, list(ids)):
            continue
        if len(ids) == 1:
            barred[ids.start] = True
        else:
            middle = len(ids) // 2
            unknown += [ids[:middle], ids[middle:]]
    return barred
