"""How samples give a step its gradients: here each in one pass. Others are read in chunks, or compared in pairs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heron.context import Part
from heron.model import RWKV
from heron.model import compiled as compilation
from heron.model.state import States

IGNORED = -100  # a target that is not learned
_BEFORE_GRAPH = 3  # passes of a shape: by then all is compiled, tuned and loaded

Sample = Sequence[Tensor | None]
"""On the host, as Learner.gradients (heron.train.step) takes it: tokens, targets, recalled, cu_seqlens, numbers."""


class Means(NamedTuple):
    """What passes are made with.

    Attributes:
        network: what computes the loss.
        start: (tokens, cu_seqlens) -> the state that texts begin from, or None: zeros.
        precision: a context for each forward pass.
        device: where they run.
        passed: is called after each backward pass, if a step has several.
    """

    network: RWKV
    start: Callable[[Tensor, Tensor | None], States | None]
    precision: Callable[[], AbstractContextManager]
    device: torch.device
    passed: Callable[[], None]

    def onto(self, tensor: Tensor | None) -> Tensor | None:
        """Copy to the device without waiting for it."""
        if tensor is None:
            return None
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


class WholePasses:
    """One pass for each sample, which a CUDA graph replays where it may.

    Args:
        means: see :class:`Means`.
        exchange: is called within the pass, if a step has only one.
        is_recorded: whether such passes, so many a step, are replayed once all is compiled.
        learning: the leaves that get a gradient by a pass.
    """

    def __init__(
        self,
        means: Means,
        exchange: Callable[[], None],
        is_recorded: Callable[[int], bool],
        learning: Callable[[], Sequence[Tensor]],
    ):
        self._means, self._exchange, self._is_recorded, self._learning = means, exchange, is_recorded, learning
        self._made, self.graphs = Counter(), {}  # by shape of batch

    def count(self, samples: Sequence[Sample]) -> int:
        """How many passes a step of these makes."""
        return len(samples)

    def weight(self, sample: Sample) -> int:
        """What counts in the mean loss of a step: targets that are learned."""
        return n_learned(sample)

    def learn(self, sample: Sample, parts: float, passes: int, part: Part | None) -> Tensor:
        """Make the forward and backward pass of one of the `passes` samples of a step.

        Args:
            parts: what its mean loss is divided by.
            part: of the sample, what this process reads, if several share it.

        Returns:
            Its share of the loss, (1,) fp32 on the device; the gradients are in the network's leaves.
        """
        if part is not None:
            sample = (part.tokens, part.targets, None, part.cu_seqlens)
        loss = self._pass([self._means.onto(tensor) for tensor in sample], parts, passes, part)
        if passes > 1:
            self._means.passed()
        return loss.view(1)

    def _pass(self, sample: list[Any], parts: float, passes: int, part: Part | None) -> Tensor:
        span = None if part is None else part.span

        def run(
            divisor: Tensor, tokens: Tensor, targets: Tensor, recalled: Any = None, cu_seqlens: Any = None
        ) -> Tensor:
            state = self._means.start(tokens, cu_seqlens)
            given: dict[str, Any] = {"recalled": recalled, "cu_seqlens": cu_seqlens, "state": state, "span": span}
            given = {name: part for name, part in given.items() if part is not None}
            with self._means.precision():
                loss = self._means.network.loss(tokens, targets, **given) / divisor
            loss.backward()
            if passes == 1:
                self._exchange()
            return loss.detach()

        if part is not None:
            parts = parts / part.share if part.share else math.inf
        shape = (passes, *(None if tensor is None else tensor.shape for tensor in sample))
        self._made[shape] += 1
        given = [torch.full((), parts, device=self._means.device), *sample]
        if not self._is_recorded(passes) or self._made[shape] <= _BEFORE_GRAPH:
            return run(*given)
        if shape not in self.graphs:
            self.graphs[shape] = compilation.PassGraph(run, self._learning(), given)
        return self.graphs[shape].replay(given)


def n_learned(sample: Sample) -> int:
    """How many targets of a sample are learned."""
    return int((sample[1] != IGNORED).sum())  # pyright: ignore[reportAttributeAccessIssue, reportOptionalOperand]
