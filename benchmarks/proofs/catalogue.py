"""What is proved: the tasks with their sizes and recipes, and the runs that each takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from benchmarks.proofs import copying, groups, parity, recall, reversal
from benchmarks.proofs.batch import Batch
from benchmarks.proofs.models import MODELS
from heron import ModelConfig, TrainConfig

Maker = Callable[[np.random.Generator, int], Batch]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task at one size.

    Attributes:
        vocab: number of token ids.
        length: tokens of a training sample.
        batch: makes training samples.
        tests: what is asked of a trained model, by name; the first is also its validation.
        shape: fields of the ModelConfig.
        recipe: fields of the TrainConfig.
        grows: whether the part of a sample that is learned grows, one answer at a time, from the first two to all.
        easier: where it grows: makes samples that are learned before those of `batch`, from the easiest on.
        pieces: in how many pieces, of `length` tokens each, a training sample is learned. Each is a step of its own,
            from the states that the piece before left.
        n_test: samples of each test.
    """

    vocab: int
    length: int
    batch: Maker
    tests: Mapping[str, Maker]
    shape: Mapping[str, int]
    recipe: Mapping[str, float | str]
    grows: bool = False
    easier: Sequence[Maker] = ()
    pieces: int = 1
    n_test: int = 2048


class Case(NamedTuple):
    """One run: a model that learns a task from a seed."""

    task: str
    model: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.model}/{self.seed}"

    def settings(self, steps: int | None = None) -> TrainConfig:
        """The run's TrainConfig; its `data` names task and model, by which `heron compare` tells runs apart."""
        task = TASKS[self.task]
        model = ModelConfig(variant="v7", vocab_size=task.vocab, **task.shape)
        config = TrainConfig(
            model=model, data=f"proof:{self.task}:{self.model}", tokenizer=f"integers:{task.vocab}", seed=self.seed,
            ctx_len=task.length, sample_every=0, save_every=0, weights="fp32", threads=1, **task.recipe,
        )  # fmt: skip
        return config if steps is None else dataclasses.replace(config, max_steps=steps)


# Tokens behind each element. A token makes at most one reflection of a state. A5 are the rotations of an icosahedron,
# each a product of two reflections; an element of S5 is a product of up to four transpositions, which are reflections.
_SILENT = {"A5": 1, "S5": 3}
_WORD_TOKENS = 10_240  # of a step


def _words(group: str, n_layer: int, length: int, silent: int) -> Task:
    batch = partial(groups.words, group, length, silent)
    *few, _ = sorted({int(count) for count in groups.swaps(group) if count})
    tests = {f"{n} elements": partial(groups.words, group, n, silent) for n in (length, 4 * length)}
    return Task(
        len(groups.product_table(group)) + 1, length * (1 + silent), batch, tests,
        dict(n_layer=n_layer, n_embd=128, head_size=32),
        dict(
            micro_bsz=_WORD_TOKENS // (length * (1 + silent)), max_steps=4000, lr_init=3e-3, lr_final=3e-5,
            warmup_steps=100, dtype="fp32",
        ),
        grows=True, easier=[partial(batch, at_most=count) for count in few], n_test=1024,
    )  # fmt: skip


def _recall(length: int, n_pairs: int, width: int) -> Task:
    batch = partial(recall.pairs, length, n_pairs)
    return Task(
        recall.VOCAB, length, batch, {f"{n_pairs} pairs": batch}, dict(n_layer=2, n_embd=width, head_size=64),
        dict(micro_bsz=2**15 // length, max_steps=2000, lr_init=2e-3, lr_final=2e-5, warmup_steps=100),
    )  # fmt: skip


def _parity(pieces: int, **recipe: float) -> Task:
    return Task(
        parity.VOCAB, 64, partial(parity.bits, 64 * pieces),
        {f"{length} bits": partial(parity.bits, length) for length in (64, 256, 1000, 10_000)},
        dict(n_layer=2, n_embd=32, head_size=16), dict(warmup_steps=100, dtype="fp32", **recipe),
        grows=True, pieces=pieces, n_test=512,
    )  # fmt: skip


TASKS: dict[str, Task] = {
    **{f"{group}-20-l{n}": _words(group, n, 20, silent) for group, silent in _SILENT.items() for n in (4, 3, 2, 1)},
    **{f"{group}-20-l4-dense": _words(group, 4, 20, silent=0) for group in _SILENT},
    **{
        f"recall-{length}-{n_pairs}-c{width}": _recall(length, n_pairs, width)
        for length, n_pairs in ((64, 4), (128, 8), (256, 16))
        for width in (64, 128, 256)
    },
    "reversal": Task(
        reversal.VOCAB, reversal.LENGTH - 1, reversal.numbers, {"1 to 60": partial(reversal.numbers, first_only=True)},
        dict(n_layer=2, n_embd=64, head_size=32),
        dict(micro_bsz=256, max_steps=10_000, lr_init=4e-3, lr_final=1e-6, dtype="fp32"),
    ),
    "parity": _parity(1, micro_bsz=256, max_steps=2500, lr_init=4e-3, lr_final=4e-5),
    "parity-carried": _parity(256, micro_bsz=32, max_steps=6000, lr_init=3e-3, lr_final=3e-5),
    "copying": Task(
        copying.VOCAB, 256 + copying.COPIED, partial(copying.noisy, 256), {"16 of 256": partial(copying.noisy, 256)},
        dict(n_layer=2, n_embd=64, head_size=32),
        dict(micro_bsz=128, max_steps=6000, lr_init=4e-3, lr_final=4e-5, warmup_steps=100, dtype="fp32"),
        grows=True,
    ),
}  # fmt: skip

# Of each proof: its tasks, and the models that learn them.
PROOFS: dict[str, Sequence[tuple[str, Sequence[str]]]] = {
    "A5": [("A5-20-l2", MODELS)],
    "S5": [("S5-20-l4", MODELS)],
    "recall": [(name, ("rwkv7",)) for name in TASKS if name.startswith("recall-")],
    "reversal": [("reversal", ("rwkv7",))],
    "parity": [(task, ("rwkv7", "signed")) for task in ("parity", "parity-carried")],
    "copying": [("copying", ("rwkv7",))],
    "layers": [(f"{group}-20-l{n}", ("rwkv7", "signed")) for group in _SILENT for n in (1, 2, 3, 4)],
    "dense": [(f"{group}-20-l4-dense", MODELS) for group in _SILENT],
}


def cases(proofs: Sequence[str], seeds: Sequence[int]) -> list[Case]:
    """The runs of some proofs, those of a proof beside each other."""
    return [
        Case(task, model, seed)
        for proof in proofs
        for task, models in PROOFS[proof]
        for model in models
        for seed in seeds
    ]
