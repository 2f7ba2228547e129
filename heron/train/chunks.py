"""Samples longer than memory: they are read chunk by chunk, and each begins from the state that the last one left.

Truncated, gradients stop at the borders, and of a chunk nothing but its state is kept. Exact, they do not: a first
reading keeps the state at each border, and then the chunks are computed again, from the last to the first, each with
the gradient of the state that it left. What is kept at once is one chunk, and on the host a state for each border.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from heron.config import ModelConfig
from heron.config.tbptt import Tbptt
from heron.context import Part
from heron.errors import ConfigError
from heron.model.state import State, States
from heron.train.passes import IGNORED, Means, Sample, n_learned

_MOVED = ("tokens", "targets", "recalled", "cu_seqlens")  # to the device, of a chunk


class Chunk(NamedTuple):
    """A span of a sample. Shapes are as in :meth:`heron.train.step.Learner.gradients`, with the T of the chunk.

    Attributes:
        share: of the sample's learned tokens, those that are in it.
        goes_on: whether it begins within a text that the chunk before began. Of packed texts that is its first.
    """

    tokens: Tensor
    targets: Tensor
    recalled: Tensor | None
    cu_seqlens: Tensor | None
    share: float
    goes_on: bool


def check(tbptt: Tbptt, model: ModelConfig) -> None:
    """ConfigError for a model of which a state does not pass on all gradients, where they shall be exact."""
    if tbptt.exact and model.rosa is not None:
        raise ConfigError(
            f"tbptt exact: of ROSA, which this {model.variant} has, a state holds symbols, which pass no gradient on; "
            f"use --tbptt {tbptt.chunk}, whose gradients stop at the chunk"
        )


def cut(sample: Sample, length: int) -> list[Chunk]:
    """A sample (tokens, targets, recalled, cu_seqlens) on the host in chunks of `length` tokens; the last is shorter.

    Of packed texts each chunk has those that it touches.
    """
    tokens, targets, recalled, cu_seqlens = (*sample, None, None)[:4]
    assert tokens is not None
    assert targets is not None
    T, n_of_sample = tokens.shape[1], n_learned(sample)
    starts = {0} if cu_seqlens is None else set(cu_seqlens.tolist())
    chunks = []
    for begin in range(0, T, length):
        end = min(begin + length, T)
        part = targets[:, begin:end]
        within = [begin, *sorted(start for start in starts if begin < start < end), end]
        chunks.append(
            Chunk(
                tokens[:, begin:end],
                part,
                None if recalled is None else recalled[:, begin:end],
                None if cu_seqlens is None else torch.tensor(within, dtype=cu_seqlens.dtype) - begin,
                int((part != IGNORED).sum()) / max(n_of_sample, 1),
                begin not in starts,
            )
        )
    return chunks


class Chunks:
    """Makes a forward and a backward pass over each chunk of a sample."""

    def __init__(self, means: Means, tbptt: Tbptt):
        self._means, self._tbptt = means, tbptt

    def count(self, samples: Sequence[Sample]) -> int:
        """How many chunks the samples of a step have."""
        return sum(-(-tokens.shape[1] // self._tbptt.chunk) for tokens, *_ in samples if tokens is not None)

    def weight(self, sample: Sample) -> int:
        """What counts in the mean loss of a step: targets that are learned."""
        return n_learned(sample)

    def learn(self, sample: Sample, parts: float, passes: int = 0, part: Part | None = None) -> Tensor:
        """The loss of a sample over `parts`; its gradients are in the network's leaves, or where `passed` put them.

        `passes` and `part` are those of :meth:`heron.train.passes.WholePasses.learn`; chunks have no use for them.

        Returns:
            (1,) fp32, on the device.
        """
        chunks = [
            chunk._replace(**{name: self._means.onto(getattr(chunk, name)) for name in _MOVED})
            for chunk in cut(sample, self._tbptt.chunk)
        ]
        return (self._exact(chunks, parts) if self._tbptt.exact else self._truncated(chunks, parts)).view(1)

    def _truncated(self, chunks: Sequence[Chunk], parts: float) -> Tensor:
        total, state = torch.zeros((), device=chunks[0].tokens.device), None
        for chunk, after in pairwise([*chunks, None]):
            assert chunk is not None
            hidden, left = self._read(chunk, state, after)
            loss = self._loss(chunk, hidden, parts)
            loss.backward()
            self._means.passed()
            total += loss.detach()
            state = None if left is None else left.map(_alone)
        return total

    def _exact(self, chunks: Sequence[Chunk], parts: float) -> Tensor:
        device = chunks[0].tokens.device
        total, state = torch.zeros((), device=device), None
        begun: list[tuple[State | None, _Generators]] = []  # each chunk's first state, on the host, and what it draws
        for chunk, after in pairwise([*chunks, None]):
            assert chunk is not None
            begun.append((None if state is None else state.to("cpu"), _Generators(device)))
            if after is not None:
                with torch.no_grad():
                    _, state = self._read(chunk, state, after)
                state = None if state is None else state.map(_alone)
        behind: State | None = None
        for after, chunk in pairwise([None, *reversed(chunks)]):
            assert chunk is not None
            state, generators = begun.pop()
            if state is not None:
                state = state.map(lambda part: part.to(device).requires_grad_(part.is_floating_point()))
            with generators.again() if after is not None else contextlib.nullcontext():
                hidden, left = self._read(chunk, state, after)
            loss = self._loss(chunk, hidden, parts)
            torch.autograd.backward(*_with_gradients(loss, left, behind))
            self._means.passed()
            total += loss.detach()
            behind = state
        return total

    def _read(self, chunk: Chunk, state: State | None, after: Chunk | None) -> tuple[Tensor, State | None]:
        """What the network makes of a chunk, and the state of the text that goes on in the one `after` it, if one does.

        `state`: of the text that goes on in this one.
        """
        wanted = after is not None and after.goes_on
        with self._means.precision():
            hidden, left = self._means.network.hidden_states(
                chunk.tokens, self._entered(chunk, state), chunk.cu_seqlens, keep_state=wanted, recalled=chunk.recalled
            )
        if isinstance(left, tuple):
            return hidden, left[-1]
        return hidden, left if left is None or chunk.cu_seqlens is None else left.of([left.batch_size - 1])

    def _entered(self, chunk: Chunk, state: State | None) -> States | None:
        """The state that the texts of a chunk begin from: the first one from `state`, if it goes on."""
        start = self._means.start(chunk.tokens, chunk.cu_seqlens)
        if state is None:
            return start
        n_others = 0 if chunk.cu_seqlens is None else len(chunk.cu_seqlens) - 2
        config = self._means.network.config
        if chunk.cu_seqlens is not None and config.state_grows:
            zeros = State.zeros(config, 1, chunk.tokens.device, state.layers[0].ffn_shift.dtype)
            return state, *(start[1:] if isinstance(start, tuple) else [zeros] * n_others)
        if not n_others:
            return state
        if isinstance(start, State):
            return State.joined([state, start.of(range(1, n_others + 1))])
        return State.joined(
            [state, State.zeros(config, n_others, chunk.tokens.device, state.layers[0].ffn_shift.dtype)]
        )

    def _loss(self, chunk: Chunk, hidden: Tensor, parts: float) -> Tensor:
        with self._means.precision():
            return self._means.network.head_loss(hidden, chunk.targets, chunk.recalled) * (chunk.share / parts)


def _with_gradients(loss: Tensor, left: State | None, behind: State | None) -> tuple[list[Tensor], list[Tensor | None]]:
    """What a backward pass of a chunk begins from: its loss, and the state it `left`, with the gradients that `behind`,
    which the next chunk began from, was given."""
    tensors: list[Tensor] = [loss]
    gradients: list[Tensor | None] = [None]
    if left is not None and behind is not None:
        for mine, other in zip(tree_leaves(left), tree_leaves(behind), strict=True):
            if mine.requires_grad and other.grad is not None:
                tensors.append(mine)
                gradients.append(other.grad)
    return tensors, gradients


def _alone(part: Tensor) -> Tensor:
    """A tensor without its graph, and without the memory of which it may be a view."""
    return part.detach().clone()


class _Generators:
    """The random generators as they are now: an adapter that drops activations must drop the same ones again."""

    def __init__(self, device: torch.device):
        self._device = device
        self._of_host = torch.get_rng_state()
        self._of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draw inside what was drawn from then on; afterwards they are as they were."""
        with torch.random.fork_rng([self._device] if self._of_device is not None else []):
            torch.set_rng_state(self._of_host)
            if self._of_device is not None:
                torch.cuda.set_rng_state(self._of_device, self._device)
            yield
