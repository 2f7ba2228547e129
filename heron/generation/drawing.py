"""The next tokens of an engine's sequences, drawn on the host or on the device that holds their logits."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from heron.errors import HeronError
from heron.generation.extras import Extras, StepExtras, likeliest
from heron.generation.requests import OpenSequence
from heron.generation.sampling import (
    Sampling,
    Token,
    check_finite,
    fade,
    increments,
    log_softmax,
    not_finite,
    sample,
)
from heron.generation.sending import sent
from heron.generation.text import stand_for_something
from heron.ops import sample_rows
from heron.tokenizer import Tokenizer


class HostDraws:
    """Draws on the CPU with :func:`heron.generation.sample`, sequence by sequence.

    Args:
        tokenizer: ids that stand for nothing in it are never drawn.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._counts: dict[int, Tensor] = {}  # by place

    @functools.cached_property
    def _increments(self) -> Tensor:
        return increments(self._tokenizer)

    @functools.cached_property
    def _barred(self) -> Tensor:
        return barred_ids(self._tokenizer)

    def keep(self, place: int, counts: Tensor | None) -> Tensor:
        """The occurrences (V,) of the sequence at `place`, with these values (None: zeros) to begin with; draws update
        them."""
        self._counts[place] = torch.zeros(self._tokenizer.vocab_size) if counts is None else counts.to("cpu", copy=True)
        return self._counts[place]

    def draw(
        self,
        sequences: Sequence[OpenSequence],
        logits: Tensor,
        meanwhile: Callable[[Tensor], None] | None = None,
    ) -> list[Token | HeronError]:
        """As :meth:`DeviceDraws.draw`; `meanwhile` is not called."""
        logits = logits.cpu()
        asking = [(row, one.extras) for row, one in enumerate(sequences) if one.extras is not None]
        if not asking:
            return [self._draw(one, row, row) for one, row in zip(sequences, logits, strict=True)]
        extras = StepExtras(asking, self._barred)
        shaped = extras.shaped(logits)
        return extras.settled([self._draw(*of_one) for of_one in zip(sequences, logits, shaped, strict=True)])

    def _draw(self, sequence: OpenSequence, logits: Tensor, allowed: Tensor) -> Token | HeronError:
        """A token of `allowed` (V,), which are `logits` (V,) less what the sequence's extras take away."""
        sampling, generator = sequence.sampling, sequence.generator
        counts = self._counts[sequence.place] if sampling.has_penalties else None
        try:
            if sequence.extras is not None:  # which may bar what is not finite
                check_finite(logits)
            token = sample(allowed, sampling, counts, generator)
            while not stand_for_something(self._tokenizer, [token]):
                allowed = allowed.clone()
                allowed[token] = -math.inf
                token = sample(allowed, sampling, counts, generator)
        except HeronError as error:
            return error
        if counts is not None:
            fade(counts, sampling.penalty_decay)
            counts[token] += self._increments[int(sampling.count_digits), token]
        logprobs = log_softmax(logits)
        drawn = Token(token, float(logprobs[token]))
        if sequence.extras is None or not sequence.extras.n_likeliest:
            return drawn
        return drawn._replace(top=likeliest(logprobs, self._barred.numpy(), sequence.extras.n_likeliest))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What stays the same from step to step while the same n sequences are open; tensors on the device."""

    sequences: list[tuple[int, Sampling, Extras | None]]
    by_chance: Sequence[int]  # the rows of those that are not greedy
    places: Tensor  # (n,) int64
    rows: Tensor  # (n,) int64, from 0 on
    settings: Tensor  # (n, 5) fp64
    decay: Tensor | None  # (n, 1) fp32; None: no sequence has penalties
    rules: Tensor  # (n,) int64, the row of `increments` that each counts by
    extras: StepExtras | None  # None: no sequence asks for any


class DeviceDraws:
    """Draws with :func:`heron.ops.sample_rows`: the settings and the occurrences of tokens are kept on the device.

    Args:
        tokenizer: ids that stand for nothing in it are never drawn.
        size: number of places for sequences.
        device: where the logits are.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, device: torch.device):
        self._tokenizer, self._size, self._device = tokenizer, size, device
        self._barred = barred_ids(tokenizer).to(device)
        self._counts = torch.zeros(0, len(self._barred), device=device)  # (size, V) fp32, once one has penalties
        self._plan: _Plan | None = None
        is_cuda = device.type == "cuda"
        self._uniforms = torch.zeros(size, dtype=torch.float64, pin_memory=is_cuda)
        self._uniform_of = self._uniforms.unbind()
        self._uniforms_there = torch.zeros(size, dtype=torch.float64, device=device)
        self._ids = torch.zeros(size, dtype=torch.int64, pin_memory=is_cuda)
        self._logprobs = torch.zeros(size, pin_memory=is_cuda)
        self._beside = torch.cuda.Stream(device) if is_cuda else None  # copies that the next step does not wait for
        self._arrived = torch.cuda.Event() if is_cuda else None

    @functools.cached_property
    def _increments(self) -> Tensor:
        return increments(self._tokenizer).to(self._device)

    def keep(self, place: int, counts: Tensor | None) -> Tensor:
        """The occurrences (V,) of the sequence at `place`, on the device, with these values to begin with; None: zeros.
        Draws update them."""
        if not len(self._counts):
            self._counts = torch.zeros(self._size, len(self._barred), device=self._device)
        return self._counts[place].zero_() if counts is None else self._counts[place].copy_(counts)

    @torch.inference_mode()
    def draw(
        self,
        sequences: Sequence[OpenSequence],
        logits: Tensor,
        meanwhile: Callable[[Tensor], None] | None = None,
    ) -> list[Token | HeronError]:
        """A token for each of `sequences`, or the error that ends it: its largest logit is NaN or infinite, or its
        constraint fails. The generator of a greedy one is not advanced.

        Args:
            logits: (n, V) of the tokenizer's ids, on the device. They may still be being computed: the host waits once,
                for the tokens.
            meanwhile: called with the ids (n,) on the device, -1 where none could be drawn, before the host waits for
                them. It leaves the logits as they are.
        """
        plan = self._plan_of([(one.place, one.sampling, one.extras) for one in sequences])
        for row in plan.by_chance:
            self._uniform_of[row].uniform_(generator=sequences[row].generator)
        counts, is_copy = None, False
        if plan.decay is not None:
            is_copy = [one.place for one in sequences] != list(range(self._size))
            counts = self._counts[plan.places] if is_copy else self._counts
        n = len(sequences)
        self._send_uniforms(plan)
        allowed = logits if plan.extras is None else plan.extras.shaped(logits)
        ids, logprobs = sample_rows(allowed, counts, self._barred, plan.settings, self._uniforms_there[:n])
        if plan.extras is not None:
            plan.extras.rank(logits, ids, logprobs)
        self._send(ids, logprobs)
        if meanwhile is not None:
            meanwhile(ids)
        drawn: list[Token | HeronError] = [
            self._refusal(logits[row], allowed[row], sequences[row].sampling, None if counts is None else counts[row])
            if token.id < 0 or math.isnan(token.logprob)
            else token
            for row, token in enumerate(self._receive(n))
        ]
        if plan.decay is not None and counts is not None:
            fade(counts, plan.decay)
            counts[plan.rows, ids] += self._increments[plan.rules, ids]
            if is_copy:
                self._counts[plan.places] = counts
        return drawn if plan.extras is None else plan.extras.settled(drawn)

    def _refusal(self, logits: Tensor, allowed: Tensor, sampling: Sampling, counts: Tensor | None) -> HeronError:
        """Why no token of `allowed` (V,) was drawn."""
        if counts is not None:
            allowed = sampling.penalised(allowed, counts)
        error = not_finite(logits) or not_finite(allowed.masked_fill(self._barred, -math.inf))
        return error or HeronError("logits: no token could be drawn from them")

    def _send_uniforms(self, plan: _Plan) -> None:
        """Bring the uniform numbers to the device while it still computes the logits."""
        if not plan.by_chance:
            return
        with self._copying():
            self._uniforms_there.copy_(self._uniforms, non_blocking=True)
        if self._beside is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._beside)

    def _send(self, ids: Tensor, logprobs: Tensor) -> None:
        """Start the copy of ids (n,) and logprobs (n,) to the host."""
        if self._beside is not None:
            self._beside.wait_stream(torch.cuda.current_stream(self._device))
            ids.record_stream(self._beside)
            logprobs.record_stream(self._beside)
        with self._copying():
            self._ids[: len(ids)].copy_(ids, non_blocking=True)
            self._logprobs[: len(ids)].copy_(logprobs, non_blocking=True)
            if self._arrived is not None:
                self._arrived.record()

    def _copying(self) -> AbstractContextManager:
        return nullcontext() if self._beside is None else torch.cuda.stream(self._beside)

    def _receive(self, n: int) -> list[Token]:
        """Both, one by one. The wait for them frees every buffer of this draw on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return list(map(Token, self._ids[:n].tolist(), self._logprobs[:n].tolist()))

    def _plan_of(self, sequences: list[tuple[int, Sampling, Extras | None]]) -> _Plan:
        if self._plan is None or self._plan.sequences != sequences:
            places, samplings, extras = zip(*sequences, strict=True)
            settings = [(s.temperature, s.top_p, s.top_k, s.presence_penalty, s.frequency_penalty) for s in samplings]
            decay = None
            if any(sampling.has_penalties for sampling in samplings):
                decay = sent([[float(s.penalty_decay)] for s in samplings], self._device)
            asking = [(row, one) for row, one in enumerate(extras) if one is not None]
            self._plan = _Plan(
                sequences,
                [row for row, sampling in enumerate(samplings) if not sampling.greedy],
                sent(places, self._device),
                torch.arange(len(places), device=self._device),
                sent(settings, self._device, torch.float64),
                decay,
                sent([int(sampling.count_digits) for sampling in samplings], self._device),
                StepExtras(asking, self._barred) if asking else None,
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
