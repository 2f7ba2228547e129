"""Numbers made wrong on purpose, for tests alone: no flag, setting or environment variable reaches this.

A trainer takes a fault only while :data:`allowed` is True, which nothing but the test harness sets.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from torch import Tensor

from heron.errors import ConfigError
from heron.model import RWKV

allowed = False

PLACES = ("loss", "gradient", "weight", "input")


@dataclasses.dataclass(frozen=True)
class Fault:
    """One wrong number, in one forward or backward pass.

    Attributes:
        value: what stands there instead.
        place: "loss", "gradient" (one element of the head's), "weight" (one element of it) or "input" (one embedded).
        forward: the forward pass of the run that is hit, from 1.
        lasting: a weight stays bad; else it is as before once the forward pass is over.
    """

    value: float
    place: str
    forward: int
    lasting: bool = False


def parse(text: str) -> Fault:
    """``"nan@loss:forward=7"`` or ``"inf@weight:forward=3:lasting"`` as a Fault.

    Raises:
        ConfigError: faults are not allowed here, or the text is none.
    """
    if not allowed:
        raise ConfigError(f"fault {text!r}: faults are for the tests of Heron itself; remove it")
    value, _, rest = text.partition("@")
    place, *options = rest.split(":")
    given = dict(option.partition("=")[::2] for option in options)
    if place not in PLACES or not given.keys() <= {"forward", "lasting"} or "forward" not in given:
        raise ConfigError(f"fault: wanted VALUE@{'|'.join(PLACES)}:forward=N[:lasting], got {text!r}")
    return Fault(float(value), place, int(given["forward"]), "lasting" in given)


def install(model: RWKV, fault: Fault) -> None:
    """Make one forward pass of `model.loss` wrong; all others are as they were."""
    healthy, count = model.loss, 0

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count != fault.forward:
            return healthy(tokens, targets)
        with _around(model, fault):
            value = healthy(tokens, targets)
        return value + fault.value if fault.place == "loss" else value

    model.loss = loss


@contextlib.contextmanager
def _around(model: RWKV, fault: Fault) -> Iterator[None]:
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
