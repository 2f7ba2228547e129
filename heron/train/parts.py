"""What a running training consists of: where it is, its parts, and the steps that are on their way."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from heron import tokenizer
from heron.checkpoint.background import Saver
from heron.data.loader import Batches, Corpus
from heron.data.packs import Packs
from heron.data.recalled import Recalled
from heron.report import Reporter
from heron.train import preference, threads
from heron.train.base_model import Base
from heron.train.guard import Guard
from heron.train.step import Learner
from heron.train.stop import Preemption


@dataclasses.dataclass
class Progress:
    """Where a run is: what its last accepted step left, and what that step has not done yet.

    Attributes:
        tokens: of all steps so far; another batch size may have been set in between.
        cursor: number of the next batch's first sample. Steps alone do not tell it: bad batches are passed over.
        owed: of the step: "validation", "sample".
        saved: whether a checkpoint holds all this.
        kept: the step of the newest checkpoint; None: there is none.
        begun, settled: perf_counter readings: when the run would have begun without pauses; the end of the last step.
    """

    step: int = 0
    tokens: int = 0
    cursor: int = 0
    seconds: float = 0.0
    owed: list[str] = dataclasses.field(default_factory=list)
    saved: bool = False
    kept: int | None = None
    begun: float = 0.0
    settled: float = 0.0


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a running training consists of."""

    learner: Learner
    tokenizer: tokenizer.Tokenizer
    corpus: Corpus
    recalled_val: Recalled | None
    batches: Batches | Packs
    val_packs: Packs | None  # in the place of the corpus's validation tokens
    guard: Guard
    stop: Preemption
    reporter: Reporter
    pace: threads.Pace
    saver: Saver
    base: Base | None  # the frozen weights that something trains beside


class Gradients(NamedTuple):
    """A forward and backward pass that was started: its loss, on the device, and the samples it is of."""

    loss: Tensor
    samples: list[tuple[Tensor | None, ...]]
    first: int
    begun: float


class Update(NamedTuple):
    """An update that was started. A GPU makes it later; `read` waits until then."""

    gradients: Gradients
    lr: float
    limit: float
    numbers: Tensor  # loss, gradient norm, whether they are bad, how many processes were asked to stop, and figures
    arrived: torch.cuda.Event | None

    def read(self) -> tuple[float, float, bool, float, dict[str, float]]:
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, grad_norm, bad, n_asked, *figures = self.numbers.tolist()
        return loss, grad_norm, bool(bad), n_asked, dict(zip(preference.FIGURES, figures, strict=False))
