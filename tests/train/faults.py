"""What befalls a run: one wrong number, put there through the loss of its model, or a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator

from torch import Tensor

import heron


@dataclasses.dataclass(frozen=True)
class Fault:
    """One wrong number, in one forward or backward pass.

    Attributes:
        value: what stands there instead.
        place: "loss", "gradient" (one element of the head's), "weight" (one element of it) or "input" (one embedded).
        forward: the forward pass that is hit, counted from 1 where the run begins or goes on.
        lasting: a weight stays bad; else it is as before once the forward pass is over.
    """

    value: float
    place: str
    forward: int
    lasting: bool = False

    def __post_init__(self) -> None:
        if self.place not in ("loss", "gradient", "weight", "input"):
            raise ValueError(f"no place {self.place!r} for a fault")


def faulty(trainer: heron.Trainer, fault: Fault) -> heron.Trainer:
    """The trainer, whose run will have that fault."""
    loop = trainer._loop

    def with_fault(parts, progress):
        install(parts.learner.network, fault)
        return loop(parts, progress)

    trainer._loop = with_fault
    return trainer


def install(model: heron.RWKV, fault: Fault) -> None:
    """Make one forward pass of `model.loss` wrong; all others are as they were."""
    healthy, count = model.loss, 0

    def loss(tokens: Tensor, targets: Tensor, **given: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count != fault.forward:
            return healthy(tokens, targets, **given)
        with _around(model, fault):
            value = healthy(tokens, targets, **given)
        return value + fault.value if fault.place == "loss" else value

    model.loss = loss


@contextlib.contextmanager
def _around(model: heron.RWKV, fault: Fault) -> Iterator[None]:
    def poke(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = fault.value
        return tensor

    weight = model.head.weight
    if fault.place == "input":
        handle = model.emb.register_forward_hook(lambda *parts: poke(parts[-1]))
    elif fault.place == "gradient":
        handle = weight.register_hook(lambda gradient: (handle.remove(), poke(gradient))[1])
    before = weight.data.view(-1)[0].clone()
    if fault.place == "weight":
        weight.data.view(-1)[0] = fault.value
    yield
    if fault.place == "input":
        handle.remove()
    if fault.place == "weight" and not fault.lasting:
        weight.data.view(-1)[0] = before


class StopAt(heron.Trainer):
    """A trainer in which one process receives a signal to stop during the given step."""

    def __init__(self, config, step, number=signal.SIGTERM, rank=0, **options):
        super().__init__(config, **options)
        self._stop_step, self._number, self._signalled = step, number, rank

    def _gradients(self, parts, first):
        if self.ranks.rank == self._signalled and first == (self._stop_step - 1) * self.config.samples_per_step:
            os.kill(os.getpid(), self._number)
        return super()._gradients(parts, first)
